"""Planted tokens: how many, where, and from where they come."""

import numpy as np
import pytest

from tokenclean_ray.plant import KINDS, from_other_rows, plant

LENGTHS = (5, 1, 40, 200, 30)
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
IDS = np.arange(OFFSETS[-1])  # every token tells where it is from
ROW = np.repeat(np.arange(len(LENGTHS)), LENGTHS)


def test_other_rows_give_any_of_their_usable_tokens_alike_and_never_the_rows_own():
    usable = IDS % 3 > 0
    at = np.tile(np.flatnonzero(usable), 6000)
    drawn = from_other_rows(IDS, usable, OFFSETS, at, np.random.default_rng(0))
    assert usable[drawn].all()
    assert (ROW[drawn] != ROW[at]).all()
    for row in np.unique(ROW[at]):
        counts = np.bincount(drawn[ROW[at] == row], minlength=len(IDS))[usable & (row != ROW)]
        assert counts.min() / counts.mean() > 0.5
        assert counts.max() / counts.mean() < 1.7


def test_a_row_without_others_keeps_its_tokens():
    alone = np.array([0, 4])
    at = np.arange(4)
    drawn = from_other_rows(np.arange(7, 11), np.ones(4, bool), alone, at, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, np.arange(7, 11))
    drawn = from_other_rows(np.arange(7, 11), np.zeros(4, bool), alone, at, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, np.arange(7, 11))


@pytest.mark.parametrize("seed", range(3))
def test_the_shares_of_each_kind_and_nothing_outside_the_places(seed):
    random = np.random.default_rng(seed)
    ids = np.tile(IDS, 40)
    offsets = np.arange(41) * len(IDS)
    places = random.random(len(ids)) < 0.7
    shares = {"random": 0.2, "other_rows": 0.1}
    new, kinds = plant(ids, places, places, offsets, shares, np.arange(1000, 1400), random)
    np.testing.assert_array_equal(kinds > 0, new != ids)
    assert not kinds[~places].any()
    assert (new[kinds == 1 + KINDS.index("random")] >= 1000).all()
    assert (new[kinds == 1 + KINDS.index("other_rows")] < len(IDS)).all()
    for number, kind in enumerate(KINDS, 1):
        assert (kinds[places] == number).mean() == pytest.approx(shares[kind], abs=0.02)
