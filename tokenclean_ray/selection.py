"""Which tokens are kept: scores from losses, the exact cut, the masks. Pure numpy.

Tokens stand in one total order: the score, falling (−0 equals 0), then a 64-bit mix of (part, row, position). A
token's place in it is a 96-bit number: 32 order-preserving bits of the score, then the mix. The global cut is the
place of the k-th token, found digit by digit (16 bits each) from histograms that can be summed over any
partitioning, so that exactly k tokens are kept however the data lies and however many scores tie.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

DIGIT_BITS = 16
SCORE_DIGITS, MIX_DIGITS = 2, 4
NEAR = 0.001  # nats: tokens this near to the cut are counted and reported

Histogram = np.ndarray
"""Counts per digit, shape (65536,), int64."""


@dataclass(frozen=True)
class Cut:
    """Keep what stands at or above this place in the order."""

    key: int
    """uint32, see `order_key`."""
    mix: int
    """uint64; tokens whose key equals `key` are kept from this mix on."""

    @property
    def score(self) -> float:
        """The lowest score that is kept."""
        return float(key_score(np.array([self.key], np.uint32))[0])


@dataclass(frozen=True)
class Scorer:
    """A score of tokens, from what is known of each: higher is kept first."""

    score: Callable[[dict[str, np.ndarray]], np.ndarray]
    """Statistics, (N,) each → float32, (N,)."""
    needs: tuple[str, ...]
    """Statistics: base and reference are losses in nats, random is uniform in [0, 1)."""


def excess_loss(token: dict[str, np.ndarray]) -> np.ndarray:
    """l_base − l_ref: how much the reference improves on the base (arXiv 2502.01968, section 3)."""
    return token["base"] - token["reference"]


def random_score(token: dict[str, np.ndarray]) -> np.ndarray:
    """The same share at random: what any scorer has to beat."""
    return token["random"]


SCORERS = {"excess_loss": Scorer(excess_loss, ("base", "reference")), "random": Scorer(random_score, ("random",))}


def uniform(mixes: np.ndarray, seed: int) -> np.ndarray:
    """float32 in [0, 1) from the tokens' `mix` and a seed."""
    return (_splitmix64(mixes ^ _splitmix64(np.array([seed], np.uint64))) >> np.uint64(40)).astype(np.float32) / 2**24


def order_key(score: np.ndarray) -> np.ndarray:
    """uint32 that sort as the float32 scores do; −0 as 0."""
    bits = (score.astype(np.float32) + np.float32(0)).view(np.uint32)  # −0 + 0 = 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))


def key_score(key: np.ndarray) -> np.ndarray:
    """The reverse of `order_key`."""
    return np.where(key >> 31, key & np.uint32(0x7FFFFFFF), ~key).astype(np.uint32).view(np.float32)


def mix(part: str, row: np.ndarray, position: np.ndarray) -> np.ndarray:
    """uint64 that order ties without favour: splitmix64 over a token's identity.

    Args:
        part: `part-` and 16 hex digits; what follows names a split of the part's rows and changes no identity.
        row: index in the part, shape (N,).
        position: index in the row, shape (N,).
    """
    place = (row.astype(np.uint64) << np.uint64(32)) | position.astype(np.uint64)
    return _splitmix64(_splitmix64(place) ^ np.uint64(int(part[5:21], 16)))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keep_count(keep_ratio: float, tokens: Any) -> Any:
    """k = floor(keep_ratio · tokens), the ratio read as the decimal number that it was written as.

    Args:
        tokens: a count or an array of counts.
    """
    ratio = Fraction(str(keep_ratio))  # the float 0.29 · 100 would give 28
    return tokens * ratio.numerator // ratio.denominator


def histogram(key: np.ndarray, tie: Callable[[np.ndarray], np.ndarray], prefix: tuple[int, ...]) -> Histogram:
    """Counts of the next digit among the tokens whose first digits are `prefix`.

    Args:
        key: `order_key` of the tokens, shape (N,).
        tie: indices of tokens → their `mix`; asked only once the score's digits are settled.
        prefix: digits already found, most significant first.
    """
    if not prefix:
        return np.bincount(key >> np.uint32(16), minlength=1 << DIGIT_BITS)
    at = np.flatnonzero(key >> np.uint32(16) == prefix[0])
    if len(prefix) == 1:
        return np.bincount(key[at] & np.uint32(0xFFFF), minlength=1 << DIGIT_BITS)
    at = at[key[at] & np.uint32(0xFFFF) == prefix[1]]
    mixes = tie(at)
    for number, digit in enumerate(prefix[SCORE_DIGITS:]):
        mixes = mixes[_mix_digit(mixes, number) == digit]
    return np.bincount(_mix_digit(mixes, len(prefix) - SCORE_DIGITS).astype(np.int64), minlength=1 << DIGIT_BITS)


def _mix_digit(mixes: np.ndarray, number: int) -> np.ndarray:
    return (mixes >> np.uint64(DIGIT_BITS * (MIX_DIGITS - 1 - number))) & np.uint64(0xFFFF)


def find_cut(count: Callable[[tuple[int, ...]], Histogram], k: int) -> Cut:
    """The place of the k-th token of the order.

    Args:
        count: prefix → the histogram of the next digit over all tokens; called two to six times.
        k: at least 1 and at most the number of tokens.
    """
    digits: tuple[int, ...] = ()
    wanted = k
    while len(digits) < SCORE_DIGITS + MIX_DIGITS:
        counts = count(digits)
        above = counts[::-1].cumsum()[::-1]  # tokens at or above each digit
        digit = int(np.flatnonzero(above >= wanted)[-1])
        wanted -= int(above[digit] - counts[digit])
        digits += (digit,)
        if wanted == counts[digit] and len(digits) >= SCORE_DIGITS:
            break  # everything in this bin is kept
    digits += (0,) * (SCORE_DIGITS + MIX_DIGITS - len(digits))
    key, tie = digits[:SCORE_DIGITS], digits[SCORE_DIGITS:]
    return Cut(_join(key), _join(tie))


def _join(digits: tuple[int, ...]) -> int:
    return sum(digit << DIGIT_BITS * place for place, digit in enumerate(reversed(digits)))


def keep_global(key: np.ndarray, tie: Callable[[np.ndarray], np.ndarray], cut: Cut) -> np.ndarray:
    """True for the tokens at or above the cut, shape (N,)."""
    keep = key > np.uint32(cut.key)
    tied = np.flatnonzero(key == np.uint32(cut.key))
    keep[tied] = tie(tied) >= np.uint64(cut.mix)
    return keep


def keep_per_row(key: np.ndarray, mixes: np.ndarray, row: np.ndarray, keep_ratio: float) -> np.ndarray:
    """True for the top share of each row's tokens by the same order, shape (N,).

    Args:
        row: the row of each token, shape (N,), not falling.
    """
    order = np.lexsort((~mixes, ~key, row))
    _, first, size = np.unique(row, return_index=True, return_counts=True)
    place = np.arange(len(row)) - np.repeat(first, size)  # within its row, after sorting
    keep = np.zeros(len(row), bool)
    keep[order] = place < np.repeat(keep_count(keep_ratio, size), size)
    return keep
