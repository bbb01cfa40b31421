"""What a worker does with one part: encode its rows, score its tokens' losses, mask and publish. Needs neither Ray
nor torch, so that a task starts fast.

Each function reads committed files of the run folder and commits one file; what it returns is a small summary.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tokenclean_ray import schema, selection
from tokenclean_ray.config import Data, Select, UserError
from tokenclean_ray.formats import to_messages
from tokenclean_ray.layout import Store
from tokenclean_ray.schema import flat_lists, list_column
from tokenclean_ray.source import Part, RawRow, RowError

if TYPE_CHECKING:
    from tokenclean_ray.encode import Encoder

Summary = dict[str, Any]


def extra_types(kinds: Iterable[dict[str, list[str]]], wanted: Iterable[str]) -> dict[str, pa.DataType]:
    """Types of the carried columns: a column whose values differ in type, or are nested, is carried as JSON text."""
    seen: dict[str, set[str]] = {}
    for file in kinds:
        for column, names in file.items():
            seen.setdefault(column, set()).update(names)
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    return {
        column: types["float"]
        if seen.get(column) == {"int", "float"}
        else types.get("".join(seen.get(column, ())), pa.string())
        for column in wanted
        if column in seen or column != "id"
    }


def encode_part(
    store: Store, part: Part, rows: list[RawRow], encoder: "Encoder", data: Data, extra: dict[str, pa.DataType]
) -> Summary:
    """Encode one part's rows, commit what was rejected, then what was encoded; returns the summary."""
    texts, spans, kept, rejected = [], [], [], []
    for row in rows:
        try:
            if row.value is None:
                raise row.error or RowError("unreadable")
            carried = _carried(row.value, part, data.columns, extra)
            text, row_spans = encoder.render(*to_messages(row.value, data.format, data.columns))
            texts.append(text)
            spans.append(row_spans)
            kept.append((row, carried))
        except RowError as error:
            rejected.append((row, error))
    columns: dict[str, list[Any]] = {name: [] for name in schema.encoded(extra).names}
    for (row, carried), tokens in zip(kept, encoder.encode(texts, spans), strict=True):
        if isinstance(tokens, RowError):
            rejected.append((row, tokens))
            continue
        for name, value in carried.items():
            columns[name].append(value)
        columns["row"].append(row.row)
        columns["input_ids"].append(tokens[0])
        columns["response_mask"].append(tokens[1])
    summary = {
        "part": part.name,
        "rows": len(rows),
        "rejected": dict(Counter(error.reason for _, error in rejected)),
        "tokens": sum(map(len, columns["input_ids"])),
        "response_tokens": int(sum(mask.sum() for mask in columns["response_mask"])),
    }
    if rejected:
        rejected.sort(key=lambda item: item[0].row)
        table = pa.Table.from_pylist([_rejection(part, row, error) for row, error in rejected], schema.REJECTED)
        store.write_part("rejected", part.name, table, {"rows": len(rejected)})
    store.write_part("encoded", part.name, pa.table(columns, schema.encoded(extra)), summary)
    return summary


def _carried(row: dict[str, Any], part: Part, columns: dict[str, str], extra: dict[str, pa.DataType]) -> dict[str, Any]:
    source = row.get(columns.get("source", "source"))
    values: dict[str, Any] = {"source": source if isinstance(source, str) and source else part.label}
    values |= {name: row.get(name) for name in extra}
    carried = {}
    for name, value in values.items():
        kind = extra.get(name, pa.string())
        if value is not None and pa.types.is_string(kind) and not isinstance(value, str):
            value = json.dumps(value, default=str, ensure_ascii=False)
        try:
            carried[name] = pa.scalar(value, kind).as_py()
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            raise RowError(f"column {name} is not {kind} as in the other rows", str(error)) from error
    return carried


def _rejection(part: Part, row: RawRow, error: RowError) -> dict[str, Any]:
    text = row.text.decode("utf-8", "replace")
    return {"row": row.row, "file": part.label, "line": row.line, "reason": error.reason, "detail": error.detail,
            "text": text}  # fmt: skip


@dataclass(frozen=True)
class PartTokens:
    """A part's rows and its N response tokens, in order."""

    part: str
    encoded: pa.Table
    at: np.ndarray
    """(N,) index in the flat rows."""
    row: np.ndarray
    """(N,) index of the row in the table."""
    position: np.ndarray
    """(N,) index in the row."""
    score: np.ndarray
    """(N,) float32, nats."""
    key: np.ndarray
    """(N,) uint32, the score's place in the order."""

    def mix(self, of: np.ndarray) -> np.ndarray:
        """What orders ties, for some of the tokens."""
        return selection.mix(self.part, self.row_numbers[self.row[of]], self.position[of])

    @property
    def row_numbers(self) -> np.ndarray:
        """The rows' numbers in the part: with the part's name their identity."""
        return self.encoded["row"].to_numpy()


def part_tokens(store: Store, part: str, losses: dict[str, str], select: Select) -> PartTokens:
    """Read a part's rows and losses and score its response tokens.

    Args:
        losses: base and reference → the folder of their losses.

    Raises:
        UserError: losses that do not fit the rows, or scores that are no numbers, naming the rows.
    """
    encoded = store.read_part("encoded", part)
    mask, offsets = flat_lists(encoded["response_mask"])
    at = np.flatnonzero(mask)
    row = np.searchsorted(offsets, at, side="right") - 1
    statistics = []
    for folder in losses.values():
        table = store.read_part(folder, part)
        values, loss_offsets = flat_lists(table["loss"])
        if not table["row"].equals(encoded["row"]) or not np.array_equal(loss_offsets, offsets):
            where = f"{store.url}/{folder}/{part}.parquet"
            raise UserError(f"{where} is of other rows: delete it and run the same command again")
        statistics.append(values[at])
    score = selection.SCORERS[select.scorer](*statistics)
    if np.isnan(score).any():
        rows = encoded["row"].to_numpy()[np.unique(row[np.isnan(score)])[:5]]
        raise UserError(
            f"the scores of {part}, rows {', '.join(map(str, rows))} … are not numbers: a model gives NaN losses; "
            "check its weights, or set model.dtype: float32"
        )
    return PartTokens(part, encoded, at, row, at - offsets[row], score, selection.order_key(score))


def publish_part(
    store: Store, folder: str, part: str, losses: dict[str, str], select: Select, cut: selection.Cut | None
) -> Summary:
    """Mask one part's rows, commit them and return the summary."""
    tokens = part_tokens(store, part, losses, select)
    encoded = tokens.encoded
    if cut is None:
        mixes = tokens.mix(np.arange(len(tokens.key)))
        keep = selection.keep_per_row(tokens.key, mixes, tokens.row, select.keep_ratio)
    else:
        keep = selection.keep_global(tokens.key, tokens.mix, cut)
    ids, offsets = flat_lists(encoded["input_ids"])
    labels = np.full(len(ids), -100, np.int32)
    labels[tokens.at[keep]] = ids[tokens.at[keep]]
    kept_per_row = np.bincount(tokens.row[keep], minlength=encoded.num_rows)
    table = encoded.drop_columns("response_mask").append_column("labels", list_column(labels, offsets, schema.TOKENS))
    source = np.array(encoded["source"].to_pylist(), object)[tokens.row]
    summary = {
        "part": part,
        "rows": int((kept_per_row > 0).sum()),
        "nothing_kept": int((kept_per_row == 0).sum()),
        "near": int((np.abs(tokens.score - cut.score) <= selection.NEAR).sum()) if cut else 0,
        "ties": int((tokens.key == cut.key).sum()) if cut else 0,
        "sources": {s: [int((source == s).sum()), int(keep[source == s].sum())] for s in sorted(set(source))},
    }
    store.write_part(folder, part, table.filter(pa.array(kept_per_row > 0)), summary)
    return summary
