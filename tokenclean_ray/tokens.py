"""The response tokens of one part: their scores and places in the order, what is kept. Needs neither Ray nor torch.

Input: the part's rows and losses in the run folder. Output: a `PartTokens`, whose arrays have one value a token.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from tokenclean_ray import scorers, selection
from tokenclean_ray.config import Select
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import PART_SUFFIX, Store
from tokenclean_ray.schema import flat_lists

COUNTED = ["row", "source", "response_mask"]
"""The columns of encoded rows that counting takes."""
Cuts = dict[str, selection.Cut]
"""Source → its cut; "" → the cut of all."""
Sources = dict[str, list[int]]
"""Source → [response tokens, kept tokens]; where there are too many to name, `MANY` → those of all."""
# a column with a value for each row must not make footers and the driver's sums as long as the data
MOST_SOURCES = 1000
MANY = "(more sources than are told apart)"


def cuts_of(threshold: dict[str, Any]) -> Cuts | None:
    """The cuts in a threshold.json; None where each row has its own."""
    if "cut" in threshold:
        return {"": selection.Cut(**threshold["cut"])}
    if "cuts" in threshold:
        return {source: selection.Cut(**found["cut"]) for source, found in threshold["cuts"].items()}
    return None


@dataclass(frozen=True)
class PartTokens:
    """A part's rows and its N response tokens, in order."""

    part: str
    encoded: pa.Table
    offsets: np.ndarray
    """(rows + 1,): row i is [offsets[i], offsets[i + 1]) of the flat rows."""
    at: np.ndarray
    """(N,) index in the flat rows."""
    score: np.ndarray
    """(N,) float32: nats, but of the scorers probability and random, and of a gate on ranks."""
    key: np.ndarray
    """(N,) uint32, the score's place in the order."""

    @cached_property
    def _by_source(self) -> dict[str, np.ndarray]:
        names, of = self.sources
        order = np.argsort(of, kind="stable")
        ends = np.searchsorted(of[order], np.arange(1, len(names)))
        return dict(zip(names, np.split(order, ends), strict=True))

    @cached_property
    def row(self) -> np.ndarray:
        """(N,) index of the row in the table."""
        return _row_of(self.at, self.offsets)

    @cached_property
    def position(self) -> np.ndarray:
        """(N,) index in the row."""
        return self.at - self.offsets[self.row]

    def groups(self, scope: str) -> Mapping[str, np.ndarray | slice]:
        """Source → indices of its tokens, where each source has its own cut; else "" → all."""
        return self._by_source if scope == "source" else {"": slice(None)}

    def look(self, scope: str, wanted: selection.Wanted | None, gathered: selection.Gathered) -> selection.Found:
        """What `selection.find_cuts` looks for, among this part's tokens."""
        counts: dict[Any, selection.Histogram] = {}
        places: dict[Any, selection.Places] = {}
        groups = self.groups(scope)
        selection.check_room(groups)
        for group, at in groups.items():
            key, tie = self.key[at], self._tie(at)
            for prefix in {()} if wanted is None else wanted.get(group, ()):
                counts[group, prefix] = selection.histogram(key, tie, prefix)
            for span in gathered.get(group, ()):
                places[group, span] = selection.gather(key, tie, span)
        return counts, places

    def _tie(self, among: np.ndarray | slice) -> Callable[[np.ndarray], np.ndarray]:
        return lambda of: self.mix(of if isinstance(among, slice) else among[of])

    def mix(self, of: np.ndarray) -> np.ndarray:
        """What orders ties, for some of the tokens."""
        return selection.mix(self.part, self.row_numbers[self.row[of]], self.position[of])

    def keep(self, select: Select, cuts: Cuts | None) -> np.ndarray:
        """True for the kept tokens, (N,); without cuts each row's own share.

        Raises:
            UserError: a source without a cut, where cuts are kept that were found before it came.
        """
        if cuts is None:
            mixes = self.mix(np.arange(len(self.key)))
            return selection.keep_per_row(self.key, mixes, self.row, select.ratio)
        keep = np.zeros(len(self.key), bool)
        for group, at in self.groups(select.scope).items():
            if group not in cuts:
                raise UserError(
                    f"select.cut has none for the source {group}: leave cut out, or keep one of scope: global"
                )
            keep[at] = selection.keep_global(self.key[at], self._tie(at), cuts[group])
        return keep

    def near_and_tied(self, select: Select, cuts: Cuts | None) -> tuple[int, int]:
        """How many tokens lie near to their cut, and how many have just its score."""
        if cuts is None:
            return 0, 0
        groups = [(cuts[group], at) for group, at in self.groups(select.scope).items()]
        near = sum(int((np.abs(self.score[at] - cut.score) <= selection.NEAR).sum()) for cut, at in groups)
        return near, sum(int((self.key[at] == cut.key).sum()) for cut, at in groups)

    def per_source(self, keep: np.ndarray) -> Sources:
        """How many tokens each source has, and how many of them are kept."""
        names, of = self.sources
        tokens, kept = (np.bincount(which, minlength=len(names)) for which in (of, of[keep]))
        return add_sources({}, {name: [int(tokens[i]), int(kept[i])] for i, name in enumerate(names) if tokens[i]})

    @cached_property
    def sources(self) -> tuple[list[str], np.ndarray]:
        """The names of the sources, and the place among them of each token's, (N,)."""
        column = self.encoded["source"].combine_chunks().dictionary_encode()
        return column.dictionary.to_pylist(), column.indices.to_numpy(zero_copy_only=False)[self.row]

    @property
    def row_numbers(self) -> np.ndarray:
        """The rows' numbers in the part: with the part's name their identity."""
        return self.encoded["row"].to_numpy()


def add_sources(total: Sources, more: Sources) -> Sources:
    """The sum of two; the same whatever the order in which many are added up."""
    total = dict(total)
    for name, (tokens, kept) in more.items():
        before = total.get(name, (0, 0))
        total[name] = [before[0] + tokens, before[1] + kept]
    if len(total) > MOST_SOURCES or MANY in total:
        total = {MANY: [sum(counts) for counts in zip(*total.values(), strict=True)]}
    return total


def part_tokens(
    store: Store, part: str, losses: dict[str, str], select: Select, columns: list[str] | None = None
) -> PartTokens:
    """Read a part's rows and losses and score its response tokens.

    Args:
        losses: base and reference → the folder of their losses.
        columns: of the rows, `COUNTED` or more; None for all.

    Raises:
        Damaged: losses that do not fit the rows.
        UserError: scores that are no numbers, naming the rows.
    """
    encoded = store.read_part("encoded", part, columns)
    mask, offsets = flat_lists(encoded["response_mask"])
    at = np.flatnonzero(mask)
    statistics = {}
    for role, wanted in itertools.groupby(scorers.statistics(select), lambda name: name.partition("_")[0]):
        if role == "random":
            row = _row_of(at, offsets)
            mixes = selection.mix(part, encoded["row"].to_numpy()[row], at - offsets[row])
            statistics[role] = selection.uniform(mixes, select.seed)
            continue
        names = list(wanted)
        read = [name.partition("_")[2] or "loss" for name in names]
        found = read_losses(store, losses[role], part, encoded["row"], offsets, read)
        statistics |= {name: values[at] for name, values in zip(names, found, strict=True)}
    score = scorers.SCORERS[select.scorer].score(statistics, select)
    # a score may hide what it is of: NaN is outside of every gate
    bad = np.logical_or.reduce([np.isnan(values) for values in (score, *statistics.values())])
    if bad.any():
        rows = encoded["row"].to_numpy()[np.unique(_row_of(at[bad], offsets))[:5]]
        raise UserError(
            f"the scores of {part}, rows {', '.join(map(str, rows))} … are not numbers: a model gives NaN losses; "
            "check its weights, or set model.dtype: float32"
        )
    return PartTokens(part, encoded, offsets, at, score, selection.order_key(score))


def _row_of(at: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The row of each of some flat tokens."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))[at]


def read_losses(
    store: Store, folder: str, part: str, rows: pa.ChunkedArray, offsets: np.ndarray, columns: Sequence[str] = ("loss",)
) -> list[np.ndarray]:
    """A part's losses, and what lies beside them, flat, like the tokens of the rows that they must be of."""
    table = store.read_part(folder, part, ["row", *columns])
    found = [flat_lists(table[column]) for column in columns]
    if not table["row"].equals(rows) or not all(np.array_equal(own, offsets) for _, own in found):
        raise store.damaged(f"{folder}/{part}{PART_SUFFIX}", "of other rows")
    return [values for values, _ in found]
