"""What a worker does with one part: encode its rows, mask and publish them, add up its losses. Needs neither Ray nor
torch, so that a task starts fast.

Each function reads committed files of the run folder and returns a small summary; most commit files first.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tokenclean_ray import schema
from tokenclean_ray.config import Data, Select
from tokenclean_ray.formats import to_messages
from tokenclean_ray.held_out import row_sums
from tokenclean_ray.layout import Store
from tokenclean_ray.schema import RowError, flat_lists, list_column
from tokenclean_ray.source import Part, RawRow
from tokenclean_ray.tokens import COUNTED, Cuts, part_tokens, read_losses

if TYPE_CHECKING:
    from tokenclean_ray.encode import Encoder

Summary = dict[str, Any]

TYPES = (({"bool"}, "bool"), ({"int", "long"}, "int64"), ({"int", "float"}, "double"))
"""Kinds of values, and the Arrow type that holds all of them exactly."""


def carried_types(kinds: dict[str, set[str]], wanted: Iterable[str]) -> dict[str, str]:
    """Arrow types of the carried columns: one whose values are of several types, or nested, is carried as JSON text.

    Args:
        kinds: column → kinds of its values in all parts, see `encode_part`.
        wanted: columns; `id` is carried where a row has one.
    """
    return {
        column: next((kind for held, kind in TYPES if column in kinds and kinds[column] <= held), "string")
        for column in wanted
        if column in kinds or column != "id"
    }


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() if abs(value) <= 2**53:
            return "int"  # a float holds it
        case int() if -(2**63) <= value < 2**63:
            return "long"
        case float():
            return "float"
    return "text"


@dataclass(frozen=True)
class Splits:
    """How the rows of a part are divided among files: by a hash of the prompt, so that duplicates stay together."""

    names: tuple[str, ...] = ("",)
    """Suffixes of the part's name; they tell everything that decides which rows they get."""
    shares: tuple[float, ...] = (1.0,)
    seed: int = 0

    def of(self, prompt: str) -> str:
        """The split that a prompt belongs to."""
        digest = hashlib.blake2b(f"{self.seed}:{prompt}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        for name, share in zip(self.names, self.shares, strict=True):
            place -= share
            if place < 0:
                return name
        return self.names[-1]

    def part_names(self, part: str) -> list[str]:
        """The files of a part."""
        return [f"{part}-{name}" if name else part for name in self.names]


def encode_part(
    store: Store,
    part: Part,
    rows: list[RawRow],
    encoder: "Encoder",
    data: Data,
    wanted: list[str],
    splits: Splits,
) -> list[Summary]:
    """Encode one part's rows, commit what was rejected, then what was encoded.

    Args:
        wanted: columns to carry.

    Returns:
        a summary per split: `part`, `file`, `split`, `rows`, `full` (those of `max_length`), `tokens`,
        `response_tokens`, `kinds` (carried column → the kinds of its values, see `TYPES`, or "text"); and, in the
        first, `input_rows` and `rejected` (reason → count), which are 0 and empty in the others.
    """
    texts, spans, kept, rejected = [], [], [], []
    for row in rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            carried = _carried(row.value, part, data.columns, wanted)
            text, row_spans = encoder.render(*to_messages(row.value, data.format, data.columns, data.turn_keys))
            texts.append(text)
            spans.append(row_spans)
            kinds = {name: _kind(row.value[name]) for name in wanted if carried[name] is not None}
            kept.append((row, carried, kinds, splits.of(text[: row_spans[0][0]])))
        except RowError as error:
            rejected.append((row, error))
    fields = schema.encoded(wanted)
    columns: dict[str, dict[str, list[Any]]] = {split: {name: [] for name in fields.names} for split in splits.names}
    seen: dict[str, dict[str, set[str]]] = {split: {} for split in splits.names}
    for (row, carried, kinds, split), tokens in zip(kept, encoder.encode(texts, spans), strict=True):
        if isinstance(tokens, RowError):
            rejected.append((row, tokens))
            continue
        values = carried | {"row": row.row, "input_ids": tokens[0], "response_mask": tokens[1]}
        for name, value in values.items():
            columns[split][name].append(value)
        for name, kind in kinds.items():
            seen[split].setdefault(name, set()).add(kind)
    if rejected:
        rejected.sort(key=lambda item: item[0].row)
        table = pa.Table.from_pylist([_rejection(part, row, error) for row, error in rejected], schema.REJECTED)
        store.write_part("rejected", part.name, table, {"rows": len(rejected)})
    summaries = []
    for name, split in zip(splits.part_names(part.name), splits.names, strict=True):
        first = split == splits.names[0]
        summary = {
            "part": name,
            "file": part.label,
            "split": split,
            "rows": len(columns[split]["row"]),
            "full": sum(len(ids) == data.max_length for ids in columns[split]["input_ids"]),
            "tokens": sum(map(len, columns[split]["input_ids"])),
            "response_tokens": int(sum(mask.sum() for mask in columns[split]["response_mask"])),
            "input_rows": len(rows) if first else 0,
            "rejected": dict(Counter(error.reason for _, error in rejected)) if first else {},
            "kinds": {column: sorted(found) for column, found in seen[split].items()},
        }
        store.write_part("encoded", name, pa.table(columns[split], fields), summary)
        summaries.append(summary)
    return summaries


def _carried(row: dict[str, Any], part: Part, columns: dict[str, str], wanted: list[str]) -> dict[str, Any]:
    """The source, and the wanted columns as JSON text."""
    source = row.get(columns.get("source", "source"))
    if isinstance(source, int):
        source = str(source)
    carried: dict[str, str | None] = {"source": source if isinstance(source, str) and source else part.label}
    for name in wanted:
        value = row.get(name)
        carried[name] = None if value is None else json.dumps(value, default=str, ensure_ascii=False)
    for name, text in carried.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise RowError("lone surrogate in text", f"column {name}") from error
    return carried


def _typed(texts: pa.ChunkedArray, kind: str) -> pa.ChunkedArray | pa.Array:
    """A carried column of encoded/ as values of a type that holds all of them."""
    if kind != "string":
        return texts.cast(kind)
    return pa.array((json.loads(text) if text and text[0] == '"' else text for text in texts.to_pylist()), pa.string())


def _rejection(part: Part, row: RawRow, error: RowError) -> dict[str, Any]:
    text = row.text.decode("utf-8", "replace")
    detail = error.detail.encode("utf-8", "backslashreplace").decode()  # a lone surrogate is no UTF-8
    return {"row": row.row, "file": part.label, "line": row.line, "reason": error.reason, "detail": detail,
            "text": text}  # fmt: skip


def publish_part(
    store: Store,
    folder: str,
    part: str,
    losses: dict[str, str],
    select: Select,
    cuts: Cuts | None,
    carried: dict[str, str],
) -> Summary:
    """Mask one part's rows, commit them and return the summary.

    Args:
        carried: columns to publish, and their Arrow types.

    Returns:
        `part`, `rows` (published), `nothing_kept` (rows left out), `near` (tokens near the cut), `ties` (tokens with
        the cut's score) and `sources` (source → [response tokens, kept tokens]).
    """
    tokens = part_tokens(store, part, losses, select)
    keep = tokens.keep(select, cuts)
    encoded = tokens.encoded
    near, ties = tokens.near_and_tied(select, cuts)
    ids, offsets = flat_lists(encoded["input_ids"])
    labels = np.full(len(ids), -100, np.int32)
    labels[tokens.at[keep]] = ids[tokens.at[keep]]
    kept_per_row = np.bincount(tokens.row[keep], minlength=encoded.num_rows)
    table = encoded.select(["row", "source"])
    for name, kind in carried.items():
        table = table.append_column(name, _typed(encoded[name], kind))
    table = table.append_column("input_ids", encoded["input_ids"])
    table = table.append_column("labels", list_column(labels, offsets, schema.TOKENS))
    summary = {
        "part": part,
        "rows": int((kept_per_row > 0).sum()),
        "nothing_kept": int((kept_per_row == 0).sum()),
        "near": near,
        "ties": ties,
        "sources": tokens.per_source(keep),
    }
    store.write_part(folder, part, table.filter(pa.array(kept_per_row > 0)), summary)
    return summary


def copy_round(store: Store, source: str, target: str, part: str, round: int) -> Summary:
    """A part of a round's selection into a snapshot, with the round's number as a column."""
    table = store.read_part(source, part)
    summary = {key: value for key, value in store.read_summary(source, part).items() if key != "part"}
    store.write_part(
        target, part, table.append_column("round", pa.array([round] * table.num_rows, pa.int32())), summary
    )
    return {"part": part, **summary}


def loss_sums(store: Store, part: str, folder: str, best: str) -> np.ndarray:
    """`held_out.row_sums` of a part.

    Args:
        folder: the losses of the model in question.
        best: the losses of the model that it is compared to.
    """
    encoded = store.read_part("encoded", part, ["row", "response_mask"])
    mask, offsets = flat_lists(encoded["response_mask"])
    own, other = (read_losses(store, of, part, encoded["row"], offsets)[0] for of in (folder, best))
    return row_sums(mask, own, other, offsets)


def agreeing_tokens(
    store: Store, part: str, one: tuple[dict[str, str], Cuts], other: tuple[dict[str, str], Cuts], select: Select
) -> int:
    """How many of a part's response tokens two (losses, cuts) both keep or both drop."""
    masks = [part_tokens(store, part, losses, select, COUNTED).keep(select, cuts) for losses, cuts in (one, other)]
    return int((masks[0] == masks[1]).sum())
