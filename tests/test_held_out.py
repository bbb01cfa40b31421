"""Held-out statistics against samples and a bootstrap, from the flat losses of rows. Their use: test_loop."""

import numpy as np
import pytest

from tokenclean_ray.held_out import held_out_statistics, row_sums


def sums_of(n, s, b):
    """Of rows with a token that is no response first, and losses that are alike within a row."""
    lengths = n.astype(int) + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.ones(offsets[-1], bool)
    mask[offsets[:-1]] = False
    loss, best = (np.repeat(total / n, lengths) * mask for total in (s, b))
    return row_sums(mask, loss, best, offsets)


@pytest.mark.parametrize("rows", [5, 10, 40])
def test_the_error_of_few_held_out_rows_is_that_of_samples(rows):
    """Over many samples its mean square is the variance of the means; a resample of a sample would say less."""
    rng = np.random.default_rng(0)
    n = np.full(rows, 10.0)
    found = [held_out_statistics(sums_of(n, n * rng.normal(1, 0.3, rows), n)) for _ in range(2000)]
    errors, differences = ([getattr(one, name) for one in found] for name in ("difference_error", "difference"))
    assert np.mean(np.square(errors)) == pytest.approx(np.var(differences), rel=0.15)


def test_held_out_statistics_against_a_bootstrap():
    rng = np.random.default_rng(0)
    n = rng.integers(5, 40, 300).astype(float)
    s = n * rng.gamma(4, 0.2, 300)
    d = s - n * (s / n + rng.normal(0.02, 0.1, 300))
    b = s - d
    found = held_out_statistics(sums_of(n, s, b))
    draws = rng.integers(0, 300, (4000, 300))
    assert found.loss == pytest.approx(s.sum() / n.sum())
    assert found.difference == pytest.approx(d.sum() / n.sum())
    assert found.best_loss == pytest.approx(b.sum() / n.sum())
    assert found.best_error == pytest.approx((b[draws].sum(1) / n[draws].sum(1)).std(), rel=0.1)
    assert found.standard_error == pytest.approx((s[draws].sum(1) / n[draws].sum(1)).std(), rel=0.1)
    assert found.difference_error == pytest.approx((d[draws].sum(1) / n[draws].sum(1)).std(), rel=0.1)
