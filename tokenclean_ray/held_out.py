"""How a model does on clean held-out rows, and whether that is worse than another. Pure numpy.

Input: the losses of the rows under both models. Output: a `HeldOut`; what the guard of the rounds goes by.
"""

from dataclasses import dataclass

import numpy as np

REFUSALS = 2  # in a row end a plan


@dataclass(frozen=True)
class HeldOut:
    """A model on held-out rows: mean loss in nats per response token, and its difference to the best model's."""

    loss: float
    standard_error: float
    difference: float
    difference_error: float
    """Standard error of the difference; rows are paired, and are what is resampled."""
    best_loss: float
    """Of the best model itself."""
    best_error: float

    @property
    def no_worse(self) -> bool:
        """Worse is: by more than the standard error of the difference, or by what is no number."""
        return self.difference <= self.difference_error


def row_sums(mask: np.ndarray, loss: np.ndarray, best: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """What `held_out_statistics` wants of some rows; the sums of several parts can be added up.

    Args:
        mask: true for response tokens of flat rows.
        loss: nats, 0 outside the response, of the model in question.
        best: the same of the model that it is compared to.
        offsets: row i is [offsets[i], offsets[i + 1]).

    Returns:
        with n, s, b, d of each row its response tokens, its loss, its loss under `best` and their difference:
        the sums of n, s, d, b, n², s², sn, d², dn, b², bn, and how many rows have a response, shape (12,) float64.
    """
    totals = [np.add.reduceat(np.append(flat, 0).astype(np.float64), offsets[:-1]) for flat in (mask, loss, best)]
    n, s, b = totals
    d = s - b
    return np.array([x.sum() for x in (n, s, d, b, n * n, s * s, s * n, d * d, d * n, b * b, b * n, n > 0)])


def held_out_statistics(sums: np.ndarray) -> HeldOut:
    """Ratio estimates with linearised standard errors over rows (Cochran, Sampling Techniques, section 2.11).

    Args:
        sums: of `row_sums`.
    """
    n, s, d, b, nn, ss, sn, dd, dn, bb, bn, rows = sums
    sampled = (rows / max(rows - 1, 1)) ** 0.5  # of one row no error is known
    found: list[float] = []
    for total, square, cross in ((s, ss, sn), (d, dd, dn), (b, bb, bn)):
        ratio = total / n
        found += [float(ratio), float(sampled * max(square - 2 * ratio * cross + ratio**2 * nn, 0.0) ** 0.5 / n)]
    return HeldOut(*found)
