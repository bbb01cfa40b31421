"""Parquet files as rows: opened without unpickling anything, a row group's digest, and the values of a table, those of
Parquet's type JSON as what they say."""

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean_ray.json_text import parse_json
from tokenclean_ray.schema import Raw, RowError, check_plain

VALUE_ERRORS = (ValueError, TypeError, OverflowError, pa.ArrowException)


def open_parquet(file: Any) -> pq.ParquetFile:
    """A Parquet file's reader; raises `ValueError` where reading values would unpickle something."""
    parquet = pq.ParquetFile(file)
    check_plain(parquet.schema_arrow)
    return parquet


def group_digest(file: Any, meta: Any, columns_and_types: pa.Schema) -> str:
    """Of a row group's bytes and of its columns' names and types, 32 hex digits."""
    columns = [meta.column(i) for i in range(meta.num_columns)]
    starts = [c.dictionary_page_offset or c.data_page_offset for c in columns]
    begin = min(starts)
    file.seek(begin)
    left = max(s + c.total_compressed_size for s, c in zip(starts, columns, strict=True)) - begin
    digest = hashlib.blake2b(str(columns_and_types.remove_metadata()).encode(), digest_size=16)
    while left > 0:
        block = file.read(min(left, 1 << 22))
        if not block:
            break
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def table_values(table: pa.Table) -> list[Raw]:
    """Each row of a table, or why it cannot be read."""
    try:
        rows = table.to_pylist(maps_as_pydicts="lossy")  # as in JSON, the last of two equal keys
        for column in filter(lambda column: _holds_json(column.type), table.schema):
            for row in rows:
                row[column.name] = _parsed(row[column.name], column.type)
        return list(rows)
    except VALUE_ERRORS as error:
        if table.num_rows > 1:
            return [value for at in range(table.num_rows) for value in table_values(table.slice(at, 1))]
        return [
            RowError("not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value cannot be read", str(error))
        ]


def _holds_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.JsonType) or any(_holds_json(kind.field(i).type) for i in range(kind.num_fields))


def _parsed(value: Any, kind: pa.DataType) -> Any:
    """A value whose parts of type JSON are what their text says: `datasets` writes so what differs from row to row."""
    if value is None or not _holds_json(kind):
        return value
    if isinstance(kind, pa.JsonType):
        return parse_json(value)
    if pa.types.is_struct(kind):
        return {field.name: _parsed(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return {key: _parsed(inner, kind.item_type) for key, inner in value.items()}
    return [_parsed(inner, kind.value_type) for inner in value]
