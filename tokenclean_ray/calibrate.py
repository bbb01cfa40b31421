"""Planted calibration: noise put into copies of some rows shows what a selection does to noise. Needs no Ray.

Input: a part's rows in the run folder. Output: `encoded/<part>-planted….parquet`, copies that are scored like any part
and never published; then, from histograms of scores, how many planted and genuine tokens each ratio and gate drops.

What is assumed: the pool's own noise scores as the planted noise does. Replaced tokens are that by construction only
where the pool's noise is of their kind; fluent wrong answers are not, and planting says nothing about tokens that are
merely redundant. The paper (arXiv 2502.01968) has no such step; this is derived here.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean_ray import schema, selection
from tokenclean_ray.config import Calibrate, Select
from tokenclean_ray.layout import Store
from tokenclean_ray.plant import KINDS, plant
from tokenclean_ray.schema import flat_lists, list_column
from tokenclean_ray.selection import Histogram, first_digits
from tokenclean_ray.tokens import COUNTED, part_tokens

FOLDS = 16  # groups of rows for the jackknife
LEAST_TAIL = 0.1  # of the planted tokens, under which a tail tells too little
Z95 = 1.96
RISK = 0.05  # that an upper limit lies below the truth
Z_RISK = 1.645
DELTA = 0.05  # of `bound_term`
METHOD = 3  # raised where estimates become others: run folders keep those of older versions


def copies_suffix(calibrate: Calibrate) -> str:
    """What follows a part's name in that of its copies; it tells everything that decides them."""
    return f"-planted{calibrate.share:g}.{calibrate.replaced:g}.{calibrate.seed}"


def plant_part(store: Store, part: str, calibrate: Calibrate, candidates: np.ndarray) -> dict[str, Any]:
    """Copy some rows of an encoded part, replace some of their response tokens, commit the copies.

    Args:
        candidates: token ids that random noise is drawn from.

    Returns:
        the copies' summary: `part`, `rows`, `tokens`, `response_tokens`, `planted`.
    """
    name = part + copies_suffix(calibrate)
    encoded = store.read_part("encoded", part, ["row", "input_ids", "response_mask"])
    ids, offsets = flat_lists(encoded["input_ids"])
    mask, _ = flat_lists(encoded["response_mask"])
    rows = encoded["row"].to_numpy()
    chosen = selection.uniform(selection.mix(part, rows, np.zeros_like(rows)), calibrate.seed) < calibrate.share
    inside = np.repeat(chosen, np.diff(offsets))
    random = np.random.default_rng([calibrate.seed, int(part[5:21], 16)])
    shares = {kind: calibrate.replaced / len(KINDS) for kind in KINDS}
    planted, kinds = plant(ids, mask & inside, mask, offsets, shares, candidates, random)
    kept = np.concatenate([[0], np.cumsum(np.diff(offsets)[chosen])])
    table = pa.table(
        [
            pa.array(rows[chosen], pa.int32()),
            list_column(planted[inside], kept, schema.TOKENS),
            list_column(mask[inside], kept, schema.FLAGS),
            list_column(kinds[inside], kept, pa.list_(pa.int8())),
        ],
        schema.PLANTED,
    )
    summary = {
        "rows": table.num_rows,
        "tokens": int(inside.sum()),
        "response_tokens": int(mask[inside].sum()),
        "planted": int((kinds > 0).sum()),
    }
    store.write_part("encoded", name, table, summary)
    return {"part": name, **summary}


def count_scores(
    store: Store, part: str, copies: str | None, losses: dict[str, str], select: Select
) -> dict[tuple[str, int], Histogram]:
    """How a part's tokens score, by the first digit of the score's place (relative resolution 2⁻⁷).

    Returns:
        ("pool", 0) → all response tokens; with copies also, by fold of rows, (kind, fold) → planted tokens of a kind,
        ("genuine", fold) → the response tokens of the rows that were copied, as they stand in the pool.
    """
    tokens = part_tokens(store, part, losses, select, COUNTED)
    found = {("pool", 0): first_digits(tokens.key)}
    if copies is None:
        return found
    planted = part_tokens(store, copies, losses, select)
    kinds = flat_lists(planted.encoded["planted"])[0][planted.at]
    for name, of, which in (
        *((kind, planted, kinds == 1 + number) for number, kind in enumerate(KINDS)),
        ("genuine", tokens, np.isin(tokens.row_numbers, planted.row_numbers)[tokens.row]),
    ):
        fold = _fold(part, of.row_numbers)[of.row]
        for number in np.unique(fold[which]):
            found[name, int(number)] = first_digits(of.key[which & (fold == number)])
    return found


def _fold(part: str, rows: np.ndarray) -> np.ndarray:
    return (selection.mix(part, rows, np.ones_like(rows)) % np.uint64(FOLDS)).astype(np.int64)


# -- estimates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, by a delete-a-group jackknife over rows (Wolter 2007, section 4.2).

    A share's is at least that of independent tokens.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Histograms of scores, over the first digit; higher digits are higher scores. F folds, D digits."""

    pool: np.ndarray
    """(D,)"""
    planted: np.ndarray
    """(F, D)"""
    genuine: np.ndarray
    """(F, D)"""

    @classmethod
    def of(cls, counts: dict[tuple[str, int], Histogram], kinds: tuple[str, ...] = KINDS) -> "Scores":
        """From the sums of `count_scores`."""
        nothing = np.zeros(1 << selection.DIGIT_BITS, np.int64)
        folds = range(FOLDS)
        planted = [sum((counts.get((kind, fold), nothing) for kind in kinds), nothing) for fold in folds]
        genuine = [counts.get(("genuine", fold), nothing) for fold in folds]
        return cls(counts[("pool", 0)], np.array(planted), np.array(genuine))

    @cached_property
    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Planted and genuine counts of all folds, (D,) each."""
        return self.planted.sum(0), self.genuine.sum(0)

    @cached_property
    def folds(self) -> list[int]:
        """Those with a planted token."""
        return [number for number in range(FOLDS) if self.planted[number].any()]

    def without(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Planted and genuine counts of all folds but one, (D,) each."""
        planted, genuine = self.whole
        return planted - self.planted[fold], genuine - self.genuine[fold]


def estimate(scores: Scores, of: Any) -> Estimate:
    """`of`(planted, genuine) with an interval; folds without a planted token tell nothing."""
    value, left_out = of(*scores.whole), np.array([of(*scores.without(fold)) for fold in scores.folds])
    if len(left_out) < 2:
        return Estimate(float(value), 0.0, 1.0)
    error = t95(len(left_out) - 1) * math.sqrt(float(_variance(left_out)))
    low, high = (min(max(float(value + sign * error), 0.0), 1.0) for sign in (-1, 1))
    return Estimate(float(value), low, high)


def _share(scores: Scores, which: int, of: Any) -> Estimate:
    """A share `of`(counts) of the planted (0) or the genuine (1) tokens.

    Its interval is no narrower than that of independent tokens: a share of none or of all varies over no folds.
    """
    found = estimate(scores, lambda *counts: of(counts[which]))
    low, high = _wilson(found.value, scores.whole[which].sum(), Z95)
    return Estimate(found.value, min(found.low, low), max(found.high, high))


def _wilson(share: float, number: float, z: float) -> tuple[float, float]:
    """The limits on a share of independent tokens of which so many were seen (Wilson 1927)."""
    n = max(number, 1)
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + side) / (1 + z**2 / n) for side in (-half, half))
    return max(0.0, low), min(1.0, high)


def t95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; of one and two degrees exact, else to within 1 % (Cornish and Fisher)."""
    return {1: 12.71, 2: 4.30}.get(freedom, Z95 + 2.37 / freedom + 2.82 / freedom**2 + 2.56 / freedom**3)


def _variance(left_out: np.ndarray) -> np.ndarray:
    """Of an estimate, from those without one group each, (F, …), by the jackknife."""
    return (len(left_out) - 1) * left_out.var(0)


def auroc(low: np.ndarray, high: np.ndarray) -> float:
    """Chance that a token of `high` scores above one of `low`, ties half, from histograms (D,)."""
    below = np.cumsum(low) - low
    return float((high * (below + low / 2)).sum() / max(float(low.sum()) * high.sum(), 1))


def cut_at(pool: np.ndarray, ratio: float) -> tuple[int, float]:
    """Where a share of the pool is kept: the last digit of which tokens are, and the share of these that are.

    Scores of −inf are never kept, so that it may be less of the pool.
    """
    first = selection.LOWEST
    eligible = pool[first:]
    above = eligible[::-1].cumsum()[::-1]
    k = min(ratio * pool.sum(), above[0])
    at = int(np.flatnonzero(above >= k)[-1])
    return first + at, float((k - (above[at] - eligible[at])) / max(eligible[at], 1))


def kept_share(counts: np.ndarray, cut: tuple[int, float]) -> float:
    """Share of the tokens of `counts`, (D,), that are kept at a cut of `cut_at`."""
    digit, part = cut
    return float((counts[digit + 1 :].sum() + part * counts[digit]) / max(counts.sum(), 1))


def noise_share(scores: Scores) -> float:
    """Upper 95 % limit on the share of noise in the pool.

    Where the pool is a mixture of noise that scores as the planted tokens do and of anything else, the share of the
    pool below a score is at least the noise share times the planted share below it; so the least quotient of the two
    bounds the noise share (Blanchard, Lee and Scott 2010, Semi-supervised novelty detection). It is met where some
    range of low scores holds noise alone. The planted share is known from a sample, of which the least quotient would
    take the luckiest place; so it is lowered, at all places alike, by what samples of independent tokens deviate
    (Massart 1990, The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality), of as many as those of the rows
    are worth, see `independent`.
    """
    planted, pool = scores.whole[0], scores.pool
    tail = np.cumsum(planted) / max(planted.sum(), 1)
    least = tail - math.sqrt(math.log(1 / RISK) / (2 * independent(scores)))
    enough = (tail >= LEAST_TAIL) & (least > 0)
    if not enough.any():
        return 1.0
    return float(min(1.0, (np.cumsum(pool)[enough] / pool.sum() / least[enough]).min()))


def independent(scores: Scores) -> float:
    """How many independent planted tokens tell as much as there are: fewer, where those of a row score alike.

    The number over the design effect (Kish 1965): how many times as much as for independent tokens the shares below
    the planted scores vary over the folds, on average; at least once. At least 1.
    """
    planted = scores.whole[0]
    number = max(float(planted.sum()), 1.0)
    if len(scores.folds) < 2:
        return 1.0
    at = np.flatnonzero(planted)
    below = np.cumsum([scores.without(fold)[0][at] for fold in scores.folds], axis=1)
    found = _variance(below / np.maximum(below[:, -1:], 1)) @ planted[at]
    share = np.cumsum(planted[at]) / number
    alone = (share * (1 - share) / number) @ planted[at]
    effect = float(found / alone) if alone else 1.0  # planted tokens that all score alike vary by nothing
    return max(1.0, number / max(1.0, effect))


def pool_noise(scores: Iterable[Scores]) -> float:
    """The share of noise in the pool by several scorers: the least, since each is an upper limit."""
    return min(noise_share(one) for one in scores)


def noise_kept(scores: Scores, ratio: float, share: float) -> float:
    """Upper 95 % limit on the share of noise among the tokens that are kept at a ratio, given that of the pool.

    Of planted tokens that are kept, the limit for independent tokens, which is above 0 also where none of the sample is
    kept; or the end of the interval by the jackknife over rows, where it is higher.
    """
    cut = cut_at(scores.pool, ratio)
    kept = kept_share(scores.pool, cut)
    found = estimate(scores, lambda planted, _: kept_share(planted, cut))
    _, high = _wilson(found.value, scores.whole[0].sum(), Z_RISK)
    return min(1.0, float(share * max(high, found.high) / kept)) if kept else 0.0


def largest_ratio(scores: Scores, share: float, max_noise: float) -> float | None:
    """The largest ratio, in hundredths, that keeps at most max_noise of noise, by the upper limit of `noise_kept`."""
    ratios = [number / 100 for number in range(100, 0, -1)]
    return next((ratio for ratio in ratios if noise_kept(scores, ratio, share) <= max_noise), None)


def dropped_by_ratio(scores: Scores, ratios: list[float], share: float) -> list[dict[str, Any]]:
    """Per ratio the share of planted and of genuine tokens that are dropped, and the limit of noise among the kept."""
    return [
        {
            "ratio": ratio,
            "planted_dropped": asdict(_share(scores, 0, lambda counts, at=cut: 1 - kept_share(counts, at))),
            "genuine_dropped": asdict(_share(scores, 1, lambda counts, at=cut: 1 - kept_share(counts, at))),
            "noise_kept": noise_kept(scores, ratio, share),
        }
        for ratio in ratios
        for cut in [cut_at(scores.pool, ratio)]
    ]


def dropped_by_gate(plausibility: Scores, gates: tuple[float, ...]) -> list[dict[str, Any]]:
    """Per gate the share of planted and of genuine tokens outside, from histograms of `scorers.plausibility`."""

    def outside(counts: np.ndarray, gate: float) -> float:
        digit = int(selection.order_key(np.array([-gate], np.float32))[0] >> selection.DIGIT_BITS)
        return float(counts[: digit + 1].sum() / max(counts.sum(), 1))

    return [
        {
            "gate": gate,
            "planted_dropped": asdict(_share(plausibility, 0, lambda counts, at=gate: outside(counts, at))),
            "genuine_dropped": asdict(_share(plausibility, 1, lambda counts, at=gate: outside(counts, at))),
        }
        for gate in gates
    ]


def bound_term(tokens: int) -> float:
    """sqrt(2·log(4/δ)/M): what training on few tokens costs in Theorem 5.1 of arXiv 2502.01968.

    The theorem bounds the loss, with probability 1 − δ, by the share of wrong labels plus this; losses in [0, 1].
    """
    return math.sqrt(2 * math.log(4 / DELTA) / max(tokens, 1))
