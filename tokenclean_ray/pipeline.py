"""The stages on Ray Data: each function runs one over parts and yields one small result per part.

What a stage makes is committed to the run folder by the process that made it; only summaries reach the driver. A
stage may be run again at any time: parts that are done are skipped.
"""

import sys
from ast import literal_eval
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from tokenclean_ray import calibrate, changes, selection
from tokenclean_ray.config import Calibrate, Data, Select
from tokenclean_ray.layout import Store
from tokenclean_ray.parts import (
    Splits,
    agreeing_tokens,
    copy_round,
    encode_part,
    loss_sums,
    publish_part,
)
from tokenclean_ray.source import Part, plan_file, read_parts, work_items
from tokenclean_ray.storage import side_by_side
from tokenclean_ray.tokens import COUNTED, Cuts, part_tokens
from tokenclean_ray.workers import (
    FEW_PARTS,
    Batch,
    Result,
    few_blocks,
    guarded,
    items_of,
    map_batches,
    map_each,
    read_each,
)

if TYPE_CHECKING:  # they import torch, which tasks that do not score can start without
    from tokenclean_ray.encode import Encoder


# -- plan --------------------------------------------------------------------------------------------------------


def plan_parts(files: list[tuple[str, str]], part_bytes: int, encoding: str) -> Iterator[list[Part]]:
    """Cut files into parts, see `plan_file`; yields those of each file."""

    def plan(file: list[str]) -> list[list[Result]]:
        url, label = file
        return [[asdict(part) for part in plan_file(url, label, part_bytes, encoding)]]

    for planned in map_each(files, plan, here=1):
        yield [Part(**part) for part in planned]


# -- encode ------------------------------------------------------------------------------------------------------


@lru_cache(1)
def _encoder(ref: Any) -> "Encoder":
    """A process makes it of its bytes once: with a vocabulary of 256,000 that takes most of a second."""
    return ray.get(ref)


def encode_parts(
    store: Store, parts: list[Part], encoder: "Encoder", data: Data, wanted: list[str], splits: Splits
) -> Iterator[Result]:
    """Rows → encoded/ and rejected/. Yields the summaries of `encode_part`, those of parts done before first."""
    there = store.part_names("encoded")
    done: list[str] = []
    missing: list[Part] = []
    for part in parts:
        if there.issuperset(names := splits.part_names(part.name)):
            done += names
        else:
            missing.append(part)
    yield from _summaries(store, "encoded", done)
    if not missing:
        return
    own_code = type(encoder.tokenizer).__module__
    if own_code.startswith("transformers_modules."):  # of a trusted model: workers have no such module
        ray.cloudpickle.register_pickle_by_value(sys.modules[own_code])
    encoder_ref = ray.put(encoder)

    def encode(item: list[dict[str, Any]]) -> list[Result]:
        found = {part: _made(store, "encoded", splits.part_names(part.name)) for part in (Part(**of) for of in item)}
        if left := [part for part, summaries in found.items() if not summaries]:
            encoder = _encoder(encoder_ref)
            for part, rows in read_parts(left, data.part_bytes):
                found[part] = encode_part(store, part, rows, encoder, data, wanted, splits)
        return [summary for summaries in found.values() for summary in summaries]

    items = [[asdict(part) for part in group] for group in work_items(missing)]
    few = FEW_PARTS if len(missing) <= FEW_PARTS else 0  # an item may be a whole file
    yield from map_each(items, encode, here=few)


# -- select ------------------------------------------------------------------------------------------------------

FOUND = ("key", "digits", "counts", "places")
"""The columns of what workers found: a histogram that is not zero at some digits, or places."""


def add_up(items: list[Any], look: Callable[[Any], selection.Found], at_once: int) -> selection.Found:
    """`selection.add_up` over all items; each worker adds its share first and sends what is not zero.

    Args:
        look: an item → what is found; keys are of strings, ints and tuples of them.
        at_once: of `side_by_side`; a process has the histograms of so many items in memory.
    """

    def work(batch: Batch) -> Batch:
        counts, places = selection.add_up(side_by_side(look, items_of(batch), at_once))
        rows = [(repr(key), b"", b"", found.tobytes()) for key, found in places.items() if len(found)]
        for key, histogram in counts.items():
            digits = np.flatnonzero(histogram)
            rows.append((repr(key), digits.astype(np.int32).tobytes(), histogram[digits].tobytes(), b""))
        return {name: [row[i] for row in rows] for i, name in enumerate(FOUND)}

    def found() -> Iterator[selection.Found]:
        for batch in map_batches(items, guarded(work), blocks=few_blocks()):
            for key, digits, counts, places in zip(*(batch[name] for name in FOUND), strict=True):
                if places:
                    yield {}, {literal_eval(key): np.frombuffer(places, np.uint64).reshape(-1, 2)}
                else:
                    histogram = np.zeros(1 << selection.DIGIT_BITS, np.int64)
                    histogram[np.frombuffer(digits, np.int32)] = np.frombuffer(counts, np.int64)
                    yield {literal_eval(key): histogram}, {}

    return selection.add_up(found())


def sum_counts(items: list[Any], count: Callable[[Any], dict[Any, np.ndarray]], at_once: int) -> dict[Any, np.ndarray]:
    """`add_up` where nothing is gathered."""
    return add_up(items, lambda item: (count(item), {}), at_once)[0]


def find_cuts(
    store: Store, parts: list[str], losses: dict[str, str], select: Select, ratios: list[float]
) -> dict[tuple[str, float], selection.FoundCut]:
    """`selection.find_cuts` over all parts; a pass or two for all ratios together."""

    def look(wanted: selection.Wanted | None, gathered: selection.Gathered, every: int) -> selection.Found:
        def at(part: str) -> selection.Found:
            return part_tokens(store, part, losses, select, COUNTED).look(select.scope, wanted, gathered)

        # a part has a histogram for each source
        return add_up(parts[::every], at, at_once=1 if select.scope == "source" else store.at_once)

    return selection.find_cuts(look, ratios)


def count_scores(
    store: Store, pairs: list[tuple[str, str | None]], losses: dict[str, str], selects: dict[str, Select]
) -> dict[str, dict[Any, np.ndarray]]:
    """`calibrate.count_scores` over all parts, each with its planted copies or None, by several selections."""

    def count(pair: tuple[str, str | None]) -> dict[Any, np.ndarray]:
        found = {name: calibrate.count_scores(store, *pair, losses, select) for name, select in selects.items()}
        return {(name, *key): histogram for name, counts in found.items() for key, histogram in counts.items()}

    found: dict[str, dict[Any, np.ndarray]] = {name: {} for name in selects}
    for (name, *key), histogram in sum_counts(pairs, count, store.at_once).items():
        found[name][tuple(key)] = histogram
    return found


def sweep_parts(
    store: Store, parts: list[str], losses: dict[str, str], select: Select, cuts: dict[float, selection.Cut]
) -> Iterator[Result]:
    """Per part, for each cut in order of its ratio, the tokens `near` it and [tokens, kept] of each of `sources`."""

    def count(part: str) -> list[Result]:
        tokens = part_tokens(store, part, losses, select, COUNTED)
        found = []
        for _, cut in sorted(cuts.items()):
            near, _ = tokens.near_and_tied(select, {"": cut})
            found.append({"near": near, "sources": tokens.per_source(tokens.keep(select, {"": cut}))})
        return [{"ratios": found}]

    yield from map_each(parts, count, at_once=store.at_once)


def plant_parts(store: Store, parts: list[str], settings: Calibrate, candidates: np.ndarray) -> Iterator[Result]:
    """Copies of some rows of encoded parts, with planted noise; yields the summaries of `plant_part`."""
    suffix = calibrate.copies_suffix(settings)

    def make(copies: str) -> Result:
        return calibrate.plant_part(store, copies.removesuffix(suffix), settings, candidates)

    yield from _commit_parts(store, "encoded", [[part + suffix] for part in parts], make)


def publish_parts(
    store: Store,
    folder: str,
    parts: list[str],
    losses: dict[str, str],
    select: Select,
    cuts: Cuts | None,
    carried: dict[str, str],
) -> Iterator[Result]:
    """Write the masked rows of each part to a folder; yields the summaries of `publish_part`, done before or not."""

    def make(part: str) -> Result:
        return publish_part(store, folder, part, losses, select, cuts, carried)

    yield from _commit_parts(store, folder, [[part] for part in parts], make)


def copy_rounds(store: Store, folder: str, rounds: dict[str, tuple[int, str]]) -> Iterator[Result]:
    """Gather the rounds' selections in a snapshot; yields their summaries.

    Args:
        rounds: part → its round and the folder of that round's selection.
    """

    def copy(part: str, round: int, source: str) -> Result:
        return copy_round(store, source, folder, part, round)

    yield from _commit_parts(store, folder, [[part, *origin] for part, origin in rounds.items()], copy)


def files_of(store: Store, parts: list[str]) -> dict[str, str]:
    """Encoded part → the input file that it is of."""
    summaries = _summaries(store, "encoded", parts)
    return {summary["part"]: summary.get("file", "") for summary in summaries}  # older versions did not note it


def count_changes(
    store: Store, pairs: list[changes.Pair], folders: tuple[str, str], losses: dict[str, str], select: Select
) -> dict[str, np.ndarray]:
    """`changes.count_changes` over all pairs."""
    return sum_counts(pairs, lambda pair: changes.count_changes(store, pair, folders, losses, select), store.at_once)


def _commit_parts(store: Store, folder: str, items: list[list[Any]], make: Callable[..., Result]) -> Iterator[Result]:
    """`items`: what `make` takes, a part first; every task gets a copy of `make`, which must not know all parts."""
    there = store.part_names(folder)
    yield from _summaries(store, folder, [part for part, *_ in items if part in there])
    missing = [item for item in items if item[0] not in there]

    def commit(item: list[Any]) -> list[Result]:
        return _made(store, folder, item[:1]) or [make(*item)]

    yield from map_each(missing, commit, at_once=store.at_once)


def _made(store: Store, folder: str, parts: list[str]) -> list[Result]:
    """Summaries of what an attempt that died since the folder was listed has made; empty where it has not made all."""
    try:
        return [store.read_summary(folder, part) for part in parts]
    except FileNotFoundError:
        return []


def _summaries(store: Store, folder: str, parts: list[str]) -> Iterator[Result]:
    """Those of parts that are there."""
    return read_each(parts, lambda part: [store.read_summary(folder, part)])


# -- held-out rows -----------------------------------------------------------------------------------------------


def sum_losses(store: Store, parts: list[str], folder: str, best: str) -> np.ndarray:
    """`loss_sums` over all parts."""
    found = map_each(parts, lambda part: [loss_sums(store, part, folder, best).tolist()], at_once=store.at_once)
    return np.sum(list(found), axis=0)


def count_agreeing(
    store: Store,
    parts: list[str],
    one: tuple[dict[str, str], Cuts],
    other: tuple[dict[str, str], Cuts],
    select: Select,
) -> int:
    """`agreeing_tokens` over all parts."""
    found = map_each(parts, lambda part: [agreeing_tokens(store, part, one, other, select)], at_once=store.at_once)
    return sum(found)
