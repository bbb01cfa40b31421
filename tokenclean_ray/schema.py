"""The Arrow schema of every stage's files, and their list columns as flat arrays.

A row's identity is (part, row); every file below belongs to one part and is named after it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

TOKENS, FLAGS, FLOATS = (pa.list_(kind) for kind in (pa.int32(), pa.bool_(), pa.float32()))

REJECTED = pa.schema(
    [
        ("row", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),  # of the file, from 1; in a Parquet file or a JSON array the row, from 1
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("text", pa.string()),  # the row as it was read
    ]
)


class RowError(ValueError):
    """A row that cannot be used: a short reason, which becomes a counter, and what exactly was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def commonest(errors: list[RowError]) -> str:
    """How many of some errors, at least one, have the most frequent reason, that reason, and the first one's detail."""
    reason, count = Counter(error.reason for error in errors).most_common(1)[0]
    detail = next(error.detail for error in errors if error.reason == reason)
    return f"{count:,}: {reason}" + (f" – {detail}" if detail else "")


Raw = dict[str, Any] | RowError
"""A row as it was read, or why it cannot be."""

STATISTICS = ("entropy", "rank")
"""What can be known of a token beside its loss."""


def losses(more: tuple[str, ...] = ()) -> pa.Schema:
    """A model's losses, and what else was asked for, of `STATISTICS`.

    Every list has a value for each token: index t is of token t given those before, 0 outside the response. loss and
    entropy are in nats; rank is how many tokens the model finds likelier.
    """
    return pa.schema([("row", pa.int32()), *((name, FLOATS) for name in ("loss", *more))])


def statistics_suffix(more: tuple[str, ...]) -> str:
    """Ends the name of a losses folder, so that files without a statistic are never mistaken for files with it."""
    return "".join(f"-{name}" for name in more)


def statistics_of(folder: str) -> tuple[str, ...]:
    """The reverse of `statistics_suffix`, from a losses folder's name."""
    found: tuple[str, ...] = ()
    while (last := folder.rpartition("-")[2]) in STATISTICS:
        found, folder = (last, *found), folder.rpartition("-")[0]
    return found


def encoded(carried: Iterable[str] = ()) -> pa.Schema:
    """Rows as tokens. Written by the encode stage, read by scoring, selection and publishing.

    Args:
        carried: columns that are published with the rows; their values are JSON text here, since their types follow
            from all files, while a part follows from one.
    """
    return pa.schema(
        [
            ("row", pa.int32()),
            ("source", pa.string()),
            *((name, pa.string()) for name in carried),
            ("input_ids", TOKENS),
            ("response_mask", FLAGS),  # same length; [0] is false, a first token has no loss
        ]
    )


def check_plain(columns: pa.Schema) -> None:
    """Raise `ValueError` for extension types, some of which Ray registers, and unpickles when a value is read."""
    for field in columns:
        if extension := _extension(field.type):
            raise ValueError(f"column {field.name} is of the extension type {extension}: write it as plain values")


def _extension(kind: pa.DataType) -> str:
    if isinstance(kind, pa.ExtensionType):
        return kind.extension_name
    if pa.types.is_dictionary(kind):
        return _extension(kind.value_type)
    inner = (kind.field(i).type for i in range(kind.num_fields))
    return next(filter(None, map(_extension, inner)), "")


def flat_lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (values, offsets): row i is values[offsets[i]:offsets[i + 1]]."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]], offsets - offsets[0]


def list_column(values: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.Array:
    """The reverse of `flat_lists`."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind.value_type), type=kind)


PLANTED = pa.schema(
    [
        ("row", pa.int32()),  # of the original, in the same part
        ("input_ids", TOKENS),
        ("response_mask", FLAGS),
        ("planted", pa.list_(pa.int8())),  # 0: as in the original; else 1 + the kind's place in plant.KINDS
    ]
)
"""Copies with planted noise: scored like encoded rows, never published."""
