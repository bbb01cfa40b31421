"""Which tokens are kept: their order by score, the exact cut, the masks. Pure numpy.

Tokens stand in one total order: the score, falling (−0 equals 0), then a 64-bit mix of (part, row, position). A
token's place in it is a 96-bit number: 32 order-preserving bits of the score, then the mix. The global cut is the
place of the k-th token, found digit by digit (16 bits each) from histograms that can be summed over any
partitioning, and among the tokens that share the first digits once these are few; so exactly k tokens are kept however
the data lies and however many scores tie. A sample tells which tokens these will be, so that one pass mostly does.
Cuts of several ratios, or of every source, are found in the same passes.
"""

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tokenclean_ray.errors import UserError

DIGIT_BITS = 16
SCORE_DIGITS, MIX_DIGITS = 2, 4
FEW = 1 << 22  # tokens that are gathered, 16 bytes each
SAMPLE = 16  # every so many parts tell about where a cut will be
MOST_HISTOGRAMS = 2000  # at a time: a gigabyte in each process that counts, and as much for those of one part
NEAR = 0.001  # nats: tokens this near to the cut are counted and reported
NEVER = 0x007FFFFF  # the key of −inf
LOWEST = (NEVER >> DIGIT_BITS) + 1  # first digit of what may be kept: −inf has the one below for itself

Histogram = np.ndarray
"""Counts per digit, shape (65536,), int64."""
Places = np.ndarray
"""Of some tokens: key and mix, shape (n, 2), uint64."""
Prefix = tuple[int, ...]
"""The first digits of a place, most significant first."""
Span = tuple[int, int]
"""First and last place, 96-bit numbers, of neighbours in the order."""
Wanted = dict[str, set[Prefix]]
"""Group of tokens (a source, or "" for all) → the prefixes whose next digit is to be counted."""
Gathered = dict[str, set[Span]]
"""Group → the spans whose tokens are wanted."""
Found = tuple[dict[Any, Histogram], dict[Any, Places]]
"""By group and prefix the counts of the next digit, by group and span the places of all its tokens."""


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
class FoundCut:
    """A cut, and how many of how many tokens stand at or above it."""

    cut: Cut
    k: int
    tokens: int


def uniform(mixes: np.ndarray, seed: int) -> np.ndarray:
    """float32 in [0, 1) from the tokens' `mix` and a seed."""
    return (_splitmix64(mixes ^ _splitmix64(np.array([seed], np.uint64))) >> np.uint64(40)).astype(np.float32) / 2**24


def order_key(score: np.ndarray) -> np.ndarray:
    """uint32 that sort as the float32 scores do; −0 as 0."""
    bits = (score.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)  # −0 + 0 = 0
    negative = (bits.view(np.int32) >> 31).view(np.uint32)  # all bits set, or none
    return bits ^ (negative | np.uint32(0x80000000))


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
    if isinstance(tokens, np.ndarray):  # by Python's integers: 0.1 · 3 has a numerator of 53 bits
        return (tokens.astype(object) * ratio.numerator // ratio.denominator).astype(np.int64)
    return tokens * ratio.numerator // ratio.denominator


def first_digits(key: np.ndarray) -> Histogram:
    """Counts of the first digit of the tokens' places."""
    return np.bincount(key >> np.uint32(DIGIT_BITS), minlength=1 << DIGIT_BITS)


def histogram(key: np.ndarray, tie: Callable[[np.ndarray], np.ndarray], prefix: Prefix) -> Histogram:
    """Counts of the next digit among the tokens whose first digits are `prefix`.

    Args:
        key: `order_key` of the tokens, shape (N,).
        tie: indices of tokens → their `mix`; asked only once the score's digits are settled.
        prefix: digits already found, most significant first.
    """
    if not prefix:
        return first_digits(key)
    at = _within(key, tie, prefix)
    digit = key[at] & np.uint32(0xFFFF) if len(prefix) == 1 else _mix_digit(tie(at), len(prefix) - SCORE_DIGITS)
    return np.bincount(digit.astype(np.int64), minlength=1 << DIGIT_BITS)


def gather(key: np.ndarray, tie: Callable[[np.ndarray], np.ndarray], span: Span) -> Places:
    """The places of the tokens within a span; other arguments as `histogram`'s."""
    (first, _), (last, _) = (divmod(place, 1 << 64) for place in span)
    at = np.flatnonzero((key >= np.uint32(first)) & (key <= np.uint32(last)))
    places = np.stack([key[at].astype(np.uint64), tie(at)], axis=1)
    return places[_is_within(places, span)]


def _is_within(places: Places, span: Span) -> np.ndarray:
    """(n,) bool."""
    key, mixes = places.T
    (first, first_mix), (last, last_mix) = (map(np.uint64, divmod(place, 1 << 64)) for place in span)
    from_first = (key > first) | ((key == first) & (mixes >= first_mix))
    return from_first & ((key < last) | ((key == last) & (mixes <= last_mix)))


def _span(prefix: Prefix, last: Prefix | None = None) -> Span:
    """All places that begin with a prefix, or those from there to the end of another as long."""
    rest = DIGIT_BITS * (SCORE_DIGITS + MIX_DIGITS - len(prefix))
    return _join(prefix) << rest, (_join(last or prefix) + 1 << rest) - 1


def _within(key: np.ndarray, tie: Callable[[np.ndarray], np.ndarray], prefix: Prefix) -> np.ndarray:
    """Indices of the tokens whose first digits are `prefix`, at least one."""
    at = np.flatnonzero(key >> np.uint32(16) == prefix[0])
    if len(prefix) > 1:
        at = at[key[at] & np.uint32(0xFFFF) == prefix[1]]
    if digits := prefix[SCORE_DIGITS:]:
        at = at[tie(at) >> np.uint64(DIGIT_BITS * (MIX_DIGITS - len(digits))) == np.uint64(_join(digits))]
    return at


def add_up(found: Iterable[Found]) -> Found:
    """Histograms of equal keys added, places of equal keys joined.

    Where more are gathered than `find_cuts` can have meant, it was misled by its sample, and what there is is let go.
    """
    counts: dict[Any, Histogram] = {}
    places: dict[Any, list[Places]] = {}
    gathered = 0
    for more_counts, more_places in found:
        for key, histogram in more_counts.items():
            if key in counts:
                counts[key] += histogram
            else:
                counts[key] = histogram
        check_room(counts)
        for key, more in more_places.items():
            places.setdefault(key, []).append(more)
            gathered += len(more)
        if gathered > 2 * FEW:
            places, gathered = {}, 0
    return counts, {key: np.concatenate(some) for key, some in places.items()}


def check_room(of_each: Sized) -> None:
    """Raise `UserError` before histograms, half a megabyte each, are more than a process has memory for."""
    if len(of_each) > MOST_HISTOGRAMS:
        raise UserError(
            f"select.scope: source finds a cut for each source, and there are more than {MOST_HISTOGRAMS:,}: name "
            "fewer (data.columns: {source: …}), or set scope to global or sample"
        )


def _mix_digit(mixes: np.ndarray, number: int) -> np.ndarray:
    return (mixes >> np.uint64(DIGIT_BITS * (MIX_DIGITS - 1 - number))) & np.uint64(0xFFFF)


@dataclass
class _Search:
    """The way to one cut."""

    ratio: float
    digits: Prefix = ()
    inside: int = 0
    """How many tokens share the digits."""
    left: int = 0
    """How many of them are kept."""
    k: int = 0
    tokens: int = 0
    cut: Cut | None = None

    def take(self, counts: Histogram) -> None:
        """Find the next digit."""
        above = counts[::-1].cumsum()[::-1]  # tokens at or above each digit
        if not self.digits:
            self.tokens = int(above[0])
            wanted = keep_count(self.ratio, self.tokens)
            self.k = self.left = min(wanted, int(above[LOWEST]))
            if self.k == 0:
                self.cut = Cut(0xFFFFFFFF, 0)  # no score is a NaN, so above all tokens
                return
        digit = int(np.flatnonzero(above >= self.left)[-1])
        self.inside = int(counts[digit])
        self.left -= int(above[digit]) - self.inside
        self.digits += (digit,)
        whole = self.left == self.inside and len(self.digits) >= SCORE_DIGITS  # all of this bin is kept
        if whole or len(self.digits) == SCORE_DIGITS + MIX_DIGITS:
            digits = self.digits + (0,) * (SCORE_DIGITS + MIX_DIGITS - len(self.digits))
            self.cut = Cut(_join(digits[:SCORE_DIGITS]), _join(digits[SCORE_DIGITS:]))

    def finish(self, places: Places) -> None:
        """Find the cut among tokens, if all that share the digits are among them."""
        places = places[_is_within(places, _span(self.digits))]
        if len(places) == self.inside:
            last = np.lexsort((places[:, 1], places[:, 0]))[len(places) - self.left]
            self.cut = Cut(*map(int, places[last]))

    def found(self) -> FoundCut:
        """Once the cut is there."""
        assert self.cut is not None
        return FoundCut(self.cut, self.k, self.tokens)


def find_cuts(
    look: Callable[[Wanted | None, Gathered, int], Found], ratios: Iterable[float]
) -> dict[tuple[str, float], FoundCut]:
    """The place of the last token that is kept, in each group of tokens at each ratio.

    One pass over the tokens does where a sample tells which of them are near to a cut; two do for about a billion
    tokens; at most six.

    Args:
        look: what to count (None stands for the empty prefix of every group that there is), what to gather, and n for
            a look at every n-th part alone → what is found. At most `FEW` tokens are gathered, by what is known.
        ratios: shares of a group's tokens; fewer are kept where fewer have a score above −inf.

    Raises:
        UserError: tokens are other ones from look to look.
    """
    ratios = list(ratios)
    sample, _ = look(None, {}, SAMPLE)
    counts, places = look(None, _near_cuts(sample, ratios), 1)
    searches = {group: [_Search(ratio) for ratio in ratios] for group, _ in counts}
    few = False
    while True:
        for group, some in searches.items():
            for search in some:
                if not search.cut and (group, search.digits) in counts:
                    search.take(counts[group, search.digits])
        for (group, (first, last)), found in places.items():
            for search in searches.get(group, []):
                if not search.cut and first <= _span(search.digits)[0] <= last:
                    search.finish(found)
        open_ones = {
            (group, search.digits): search.inside
            for group, some in searches.items()
            for search in some
            if not search.cut
        }
        if not open_ones:
            return {(group, search.ratio): search.found() for group, some in searches.items() for search in some}
        if few:
            raise UserError("losses changed while their cut was looked for: run the same command again, alone")
        few = sum(open_ones.values()) <= FEW
        wanted: Wanted = {}
        spans: Gathered = {}
        for group, prefix in open_ones:
            wanted.setdefault(group, set()).add(prefix)
            spans.setdefault(group, set()).add(_span(prefix))
        counts, places = look({}, spans, 1) if few else look(wanted, {}, 1)


def _near_cuts(sample: Mapping[tuple[str, Prefix], Histogram], ratios: list[float]) -> Gathered:
    """Where the cuts will be, by counts of the first digit in a sample: as widely as few tokens are there."""
    spans: Gathered = {}
    for (group, _), counts in sample.items():
        few = FEW // (SAMPLE * len(sample) * len(ratios))
        from_here = counts[::-1].cumsum()[::-1]  # tokens at or above each digit
        above = from_here - counts
        for ratio in ratios:
            k = min(keep_count(ratio, int(from_here[0])), int(from_here[LOWEST]))
            first = max(LOWEST, int(np.flatnonzero(above <= k + few // 4)[0]))
            last = int(np.flatnonzero(from_here >= k - few // 4)[-1])
            if 0 < from_here[first] - above[last] <= few:
                spans.setdefault(group, set()).add(_span((first,), (last,)))
    return spans


def _join(digits: tuple[int, ...]) -> int:
    return sum(digit << DIGIT_BITS * place for place, digit in enumerate(reversed(digits)))


def keep_global(key: np.ndarray, tie: Callable[[np.ndarray], np.ndarray], cut: Cut) -> np.ndarray:
    """True for the tokens at or above the cut, shape (N,)."""
    keep = key > np.uint32(cut.key)
    tied = np.flatnonzero(key == np.uint32(cut.key))
    keep[tied] = tie(tied) >= np.uint64(cut.mix)
    return keep


def keep_per_row(key: np.ndarray, mixes: np.ndarray, row: np.ndarray, keep_ratio: float) -> np.ndarray:
    """True for the top share of each row's tokens by the same order, but never for a score of −inf, shape (N,).

    Args:
        row: the row of each token, shape (N,), not falling.
    """
    order = np.lexsort((~mixes, ~key, row))
    _, first, size = np.unique(row, return_index=True, return_counts=True)
    place = np.arange(len(row)) - np.repeat(first, size)  # within its row, after sorting
    keep = np.zeros(len(row), bool)
    keep[order] = place < np.repeat(keep_count(keep_ratio, size), size)
    return keep & (key != np.uint32(NEVER))
