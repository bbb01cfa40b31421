"""A finished run, read back. What report, inspect and export share.

Input: a run folder. Output: its record, the selections that its snapshot was made of, and rows with the score and the
figures of every response token.
"""

import contextlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tokenclean_ray.config import Select
from tokenclean_ray.errors import UserError
from tokenclean_ray.layout import Damaged, Store
from tokenclean_ray.schema import flat_lists
from tokenclean_ray.storage import absolute, side_by_side
from tokenclean_ray.tokens import Cuts, PartTokens, cuts_of, part_tokens, read_losses

SEED = 0  # of samples
SAMPLE_BYTES = 32 << 20  # of encoded rows and losses: about 3 million tokens
# what a terminal or a browser would obey instead of show; ZWJ and ZWNJ, which emoji and Persian need, are text
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@dataclass(frozen=True)
class Chosen:
    """A selection that went into the snapshot: the only one of `clean`, or that of a round."""

    round: int | None
    threshold: dict[str, Any]
    """Contents of its threshold.json."""
    parts: list[str]

    @property
    def cuts(self) -> Cuts | None:
        """By source, or one for all; None where each row has its own."""
        return cuts_of(self.threshold)

    @property
    def scores(self) -> dict[str, float]:
        """Source → the lowest score that is kept; "" stands for all; empty where each row has its own cut."""
        of_sources = {source: found["score"] for source, found in self.threshold.get("cuts", {}).items()}
        scores = of_sources or {"": self.threshold.get("score")}
        return {source: score for source, score in scores.items() if score is not None}


@dataclass(frozen=True)
class Finished:
    """A run that has published a snapshot."""

    store: Store
    record: dict[str, Any]
    """Contents of run.json."""
    manifest: dict[str, Any]
    """Of the snapshot: selection, parts, tokenizer, template."""
    selections: list[Chosen]
    trusted: bool
    """Whether the tokenizer's own Python code may run."""

    @property
    def snapshot(self) -> str:
        """Its folder, relative to the run's."""
        return f"masked/{self.record['result']['snapshot']}"

    @property
    def select(self) -> dict[str, Any]:
        """The last selection's settings, as they were used: what the config left open is a number here."""
        return dict(self.selections[-1].threshold["select"])

    @property
    def sources(self) -> dict[str, tuple[int, int]]:
        """Source → its response tokens and the kept ones among them, exact."""
        total: dict[str, tuple[int, int]] = {}
        for chosen in self.selections:
            for name, count in chosen.threshold["sources"].items():
                tokens, kept = total.get(name, (0, 0))
                total[name] = tokens + count["tokens"], kept + count["kept"]
        return total

    @cached_property
    def tokenizer(self) -> Any:
        """The base's; raises `UserError` where it is gone or another one by now."""
        from tokenclean_ray.models import load_tokenizer, vocabulary_fingerprint  # they import torch

        base = self.record["models"]["base"]
        path = base["path"]
        tokenizer = load_tokenizer(path, self.trusted, base.get("revision"))  # older runs did not write it
        if vocabulary_fingerprint(tokenizer) != self.manifest["tokenizer"]:
            raise UserError(f"model {path} has another tokenizer than the run {self.store.url} was made with")
        return tokenizer


def open_finished(url: str, trusted: bool = False) -> Finished:
    """Read a run folder's records.

    Args:
        trusted: the tokenizer's own Python code may run; the run folder, which may be somebody else's, is not asked.

    Raises:
        UserError: no run folder, one whose run has not ended, or one that lost files.
    """
    store = Store(absolute(url))
    with whole(store):
        record = store.read_json("run.json")
        if record is None:
            raise UserError(f"{url} is no run folder: it has no run.json")
        if "result" not in record:
            raise UserError(f"the run {url} has not ended: give its `tokenclean clean` or `evolve` command again")
        result = record["result"]
        manifest = store.read_json(f"masked/{result['snapshot']}/manifest.json")
        if manifest is None:
            raise UserError(f"{url}: snapshot {result['snapshot']} has no manifest.json: clean the data again")
        return Finished(store, record, manifest, _selections(store, record, manifest), trusted)


def _selections(store: Store, record: dict[str, Any], manifest: dict[str, Any]) -> list[Chosen]:
    if "rounds" not in record:
        return [Chosen(None, _threshold(store, manifest["selection"]), manifest["parts"])]
    published = record["rounds"][-1]["plan"]
    found = []
    for outcome in record["rounds"]:
        if outcome["plan"] == published:
            parts = store.part_names(f"selections/{outcome['selection']}").intersection(manifest["parts"])
            found.append(Chosen(outcome["round"], _threshold(store, outcome["selection"]), sorted(parts)))
    return found


def _threshold(store: Store, name: str) -> dict[str, Any]:
    threshold = store.read_json(f"selections/{name}/threshold.json")
    if threshold is None or "sources" not in threshold:  # found again, but not counted yet
        raise UserError(f"{store.url}/selections/{name} has no complete threshold.json: clean the data again")
    return threshold


@dataclass(frozen=True)
class ScoredPart:
    """A part's rows with what is known of each of its N response tokens."""

    tokens: PartTokens
    keep: np.ndarray
    """(N,) bool."""
    losses: dict[str, np.ndarray]
    """base and reference, where the scorer reads them: (N,) float32, nats."""
    turn: np.ndarray
    """(N,) number of the answer in its row, from 0."""
    place: np.ndarray
    """(N,) index in the answer."""
    round: int | None

    @property
    def ids(self) -> np.ndarray:
        """(N,) token ids."""
        return flat_lists(self.tokens.encoded["input_ids"])[0][self.tokens.at]

    @cached_property
    def dropped(self) -> np.ndarray:
        """(rows,) share of each row's response tokens that is dropped."""
        rows = self.tokens.encoded.num_rows
        size = np.bincount(self.tokens.row, minlength=rows)
        return np.bincount(self.tokens.row[~self.keep], minlength=rows) / np.maximum(size, 1)

    @cached_property
    def sources(self) -> list[str]:
        """Of each row."""
        return self.tokens.encoded["source"].to_pylist()


@contextlib.contextmanager
def whole(store: Store) -> Iterator[None]:
    """A run is read within; raises `UserError` where a file is gone or damaged, which `clean` alone can mend: a damaged
    one once it is gone, since a run that has nothing else to do does not read it."""
    try:
        yield
    except Damaged as error:
        raise UserError(f"{next(iter(error.files.values()))}: delete it, then clean the data again") from error
    except FileNotFoundError as error:
        raise UserError(f"{store.url} has lost {error}: clean the data again") from error


def read_scored(finished: Finished, chosen: Chosen, part: str) -> ScoredPart:
    """A part's rows and the figures of their response tokens."""
    losses = chosen.threshold["losses"]
    # a gate on the surprise that was found may be below 0, which none that is given may be
    select = Select.model_construct(**chosen.threshold["select"])
    with whole(finished.store):
        tokens = part_tokens(finished.store, part, losses, select)
        _, offsets = flat_lists(tokens.encoded["input_ids"])
        figures = {
            role: read_losses(finished.store, folder, part, tokens.encoded["row"], offsets)[0][tokens.at]
            for role, folder in losses.items()
        }
    first = np.append(True, (np.diff(tokens.at) > 1) | (np.diff(tokens.row) > 0))[: len(tokens.at)]
    answer = first.cumsum() - 1
    starts = np.flatnonzero(first)
    row_of_answer = tokens.row[starts]
    first_answer = np.searchsorted(row_of_answer, row_of_answer)
    turn = (np.arange(len(starts)) - first_answer)[answer]
    place = np.arange(len(answer)) - starts[answer]
    return ScoredPart(tokens, tokens.keep(select, chosen.cuts), figures, turn, place, chosen.round)


def sample_parts(finished: Finished, budget: int = SAMPLE_BYTES) -> Iterator[ScoredPart]:
    """Parts in a seeded random order, at least one, until their files have `budget` bytes."""
    store = finished.store
    places = [(chosen, part) for chosen in finished.selections for part in sorted(chosen.parts)]
    random.Random(SEED).shuffle(places)

    def size_of(place: tuple[Chosen, str]) -> int:
        chosen, part = place
        with whole(store):
            return sum(
                store.size(f"{folder}/{part}.parquet") for folder in ("encoded", *chosen.threshold["losses"].values())
            )

    sizes = itertools.accumulate(side_by_side(size_of, places))
    within = itertools.takewhile(lambda item: item[0] == 0 or item[1] <= budget, enumerate(sizes))
    drawn = places[: sum(1 for _ in within)]
    yield from side_by_side(lambda place: read_scored(finished, *place), drawn, store.at_once)


Figures = dict[str, Any]
"""Of a response token: `text`, `keep` (bool), `score` (None where ruled out); `base` and `reference` where known."""


def row_tokens(finished: Finished, scored: ScoredPart, row: int) -> list[str | Figures]:
    """A row as it reads: response tokens with their figures, the text between them as plain strings.

    Args:
        row: index in the part's table.
    """
    ids = scored.tokens.encoded["input_ids"][row].as_py()
    at = {int(scored.tokens.position[n]): int(n) for n in np.flatnonzero(scored.tokens.row == row)}
    found: list[str | Figures] = []
    for position, text in enumerate(texts(finished.tokenizer, ids)):
        if position in at:
            found.append({"text": text} | _figures(scored, at[position]))
        elif found and isinstance(found[-1], str):
            found[-1] += text
        else:
            found.append(text)
    return found


def _figures(scored: ScoredPart, n: int) -> Figures:
    score = float(scored.tokens.score[n])
    losses = {name: float(values[n]) for name, values in scored.losses.items()}
    return {"keep": bool(scored.keep[n]), "score": score if np.isfinite(score) else None, **losses}


def texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; a character made of several tokens counts to the last of them.

    A token is decoded behind the ones before it since the last whole character but one, because decoders drop a
    leading space (the method of text-generation-inference's streaming).
    """
    found, start, end = [], 0, 0
    for stop in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:end])
        now = _decode(tokenizer, ids[start:stop])
        whole = not now.endswith("\ufffd") or stop - end > 4  # UTF-8 has at most four bytes
        found.append(visible(now[len(before) :]) if whole else "")
        if whole:
            start, end = end, stop
    return found


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """Text with control and direction characters written out, so that nothing obeys them; newlines and tabs stay."""
    return CONTROLS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
