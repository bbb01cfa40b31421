"""Input files → parts → rows.

Input: paths, folders, globs or hub datasets. Output: a list of `Part`s, the same on any machine for the same
input, and the raw rows of each. A text file (JSON lines, a JSON array, either compressed) is cut at multiples of
`part_bytes` moved to line ends; a Parquet file at its row groups, large ones divided.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean_ray.config import UserError, nearest
from tokenclean_ray.layout import absolute

TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BOM = b"\xef\xbb\xbf"
SAMPLE_ROWS = 100  # of each file, to find the types of the carried columns


class RowError(ValueError):
    """A row that cannot be used: a short reason, which becomes a counter, and what exactly was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Part:
    """A range of rows of one file: the unit of work and of resume."""

    name: str
    """`part-` and a hash of the encoding, the file's label, the range and its bytes."""
    url: str
    label: str
    """The file as the user's pattern spells it: the source of rows that name none."""
    start: int
    """Text: byte offset in the uncompressed file. Parquet: first row in the file."""
    stop: int
    first_line: int
    """From 1."""
    access: Literal["seek", "stream", "group"]
    """How it is read: at its offset; by passing over the file (compressed, or a JSON array); as a row group."""
    group: int = -1
    """Parquet: the row group."""


@dataclass(frozen=True)
class RawRow:
    """A row as read: `value`, or the error that says why there is none."""

    row: int
    line: int
    text: bytes
    value: dict[str, Any] | None
    error: RowError | None


def list_files(paths: Iterable[str]) -> list[tuple[str, str]]:
    """(absolute URL, label) of every input file, each once, sorted by label.

    Raises:
        UserError: a path that matches nothing or a file of an unknown kind.
    """
    found: dict[str, str] = {}
    for path in paths:
        for url, label in _match(path):
            found.setdefault(url, label)
    return sorted(found.items(), key=lambda item: (item[1], item[0]))


def _match(path: str) -> list[tuple[str, str]]:
    # hf://datasets/… and s3://… keep their scheme; a local path is shown as the user wrote it
    try:
        fs, root = fsspec.core.url_to_fs(absolute(path))
    except (ImportError, ValueError) as error:
        raise UserError(f"data.path {path}: {error}") from error
    if any(c in path for c in "*?["):
        files = [f for f in fs.glob(root) if fs.isfile(f) and not _hidden(f.rpartition("/")[2])]
    elif fs.isdir(root):
        files = [f for f in fs.find(root) if _is_data(f) and not _hidden(f[len(root) :])]
    elif fs.exists(root):
        if not _is_data(root):
            raise UserError(f"data.path {path}: unknown kind of file; known are {', '.join(SUFFIXES)}, also .gz, .zst")
        files = [root]
    else:
        folder = root.rpartition("/")[0]
        names = [f.rpartition("/")[2] for f in fs.ls(folder, detail=False)] if fs.isdir(folder) else []
        raise UserError(f"data.path {path} does not exist{nearest(root.rpartition('/')[2], names)}")
    files = [f for f in files if _is_data(f)]
    if not files:
        raise UserError(f"data.path {path} matches no file that ends in {', '.join(SUFFIXES)} (also .gz, .zst)")
    if "://" in path:
        return [(url, url) for url in map(fs.unstrip_protocol, files)]
    return [(f, f if os.path.isabs(path) else os.path.relpath(f)) for f in files]


def _hidden(relative: str) -> bool:
    return any(step.startswith((".", "_")) for step in relative.strip("/").split("/"))


def _compression(url: str) -> str | None:
    return next((name for suffix, name in COMPRESSIONS.items() if url.endswith(suffix)), None)


def _is_data(url: str) -> bool:
    if url.endswith(".parquet"):
        return True
    for suffix in COMPRESSIONS:
        url = url.removesuffix(suffix)
    return url.endswith(TEXT_SUFFIXES)


def plan_file(url: str, label: str, part_bytes: int, encoding: str, extra: Iterable[str]) -> dict[str, Any]:
    """Cut one file into parts; reads it once, from end to end.

    Args:
        encoding: fingerprint of everything that decides how a row becomes tokens; it enters the parts' names.
        extra: columns whose types are wanted.

    Returns:
        `parts` (list of `Part`) and `kinds` (column → sorted list of the kinds seen in the first rows).

    Raises:
        UserError: the file cannot be read.
    """
    plan = _plan_parquet if url.endswith(".parquet") else _plan_text
    try:
        return plan(url, label, part_bytes, encoding, list(extra))
    except (OSError, pa.ArrowException, ijson.JSONError, UnicodeDecodeError) as error:
        raise _unreadable(label, error) from error


def _unreadable(label: str, error: Exception) -> UserError:
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"{label} cannot be read ({why}): mend or leave out the file")


def _name(encoding: str, label: str, start: int, stop: int, digest: bytes) -> str:
    whole = hashlib.blake2b(digest_size=8)
    for piece in (encoding.encode(), label.encode("utf-8", "surrogateescape"), f"{start}-{stop}".encode(), digest):
        whole.update(len(piece).to_bytes(8, "little") + piece)
    return f"part-{whole.hexdigest()}"


def _plan_text(url: str, label: str, part_bytes: int, encoding: str, extra: list[str]) -> dict[str, Any]:
    parts = []
    kinds: dict[str, set[str]] = {}
    start, line = 0, 1
    access: Literal["seek", "stream"] = "seek"
    for block, access in _blocks(url, part_bytes):
        if block.strip():
            stop = start + len(block)
            name = _name(encoding, label, start, stop, hashlib.blake2b(block, digest_size=16).digest())
            parts.append(Part(name, url, label, start, stop, line, access))
        if line <= SAMPLE_ROWS:
            for text in block.removeprefix(BOM).split(b"\n", SAMPLE_ROWS)[:SAMPLE_ROWS]:
                _note_kinds(text, extra, kinds)
        start += len(block)
        line += block.count(b"\n")
    return {"parts": parts, "kinds": {column: sorted(seen) for column, seen in kinds.items()}}


def _blocks(url: str, part_bytes: int) -> Iterator[tuple[bytes, Literal["seek", "stream"]]]:
    """The file's text as JSON lines, cut at multiples of part_bytes moved to line ends; and how to get there again."""
    compression = _compression(url)
    with fsspec.open(url, "rb") as raw:
        # Arrow's, because zstandard's own reader takes a file cut short for one that ends there
        file = io.BufferedReader(pa.CompressedInputStream(raw, compression) if compression else raw, 1 << 20)
        if file.peek(64)[:64].removeprefix(BOM).lstrip()[:1] == b"[":
            yield from ((block, "stream") for block in _array_blocks(file, part_bytes))
            return
        position = 0
        while block := file.read(part_bytes - position % part_bytes):
            if not block.endswith(b"\n"):
                block += file.readline()
            position += len(block)
            yield block, "stream" if compression else "seek"


def _array_blocks(file: io.BufferedReader, part_bytes: int) -> Iterator[bytes]:
    if file.peek(3)[:3] == BOM:
        file.read(3)
    block = bytearray()
    for value in ijson.items(file, "item", use_float=True):
        block += json.dumps(value).encode() + b"\n"
        if len(block) >= part_bytes:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _note_kinds(text: bytes, columns: list[str], kinds: dict[str, set[str]]) -> None:
    try:
        row = parse_line(text)
    except RowError:
        return  # the encode stage rejects it, with its line
    for column in columns:
        if row.get(column) is not None:
            kinds.setdefault(column, set()).add(_json_kind(row[column]))


def _json_kind(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int():
            return "int" if -(2**63) <= value < 2**63 else "other"
        case float():
            return "float"
        case str():
            return "string"
    return "other"


def _plan_parquet(url: str, label: str, part_bytes: int, encoding: str, extra: list[str]) -> dict[str, Any]:
    parts = []
    with fsspec.open(url, "rb") as file:
        parquet = pq.ParquetFile(file)
        first = 0
        for group in range(parquet.num_row_groups):
            meta = parquet.metadata.row_group(group)
            digest = _group_digest(file, meta, parquet.schema_arrow)
            size = max(1, -(-meta.num_rows * part_bytes // max(meta.total_byte_size, 1)))
            for start in range(first, first + meta.num_rows, size):
                stop = min(start + size, first + meta.num_rows)
                name = _name(encoding, label, start, stop, digest)
                parts.append(Part(name, url, label, start, stop, start + 1, "group", group))
            first += meta.num_rows
        schema = parquet.schema_arrow
    kinds = {c: [_arrow_kind(schema.field(c).type)] for c in extra if c in schema.names}
    return {"parts": parts, "kinds": kinds}


def _group_digest(file: Any, meta: Any, columns_and_types: pa.Schema) -> bytes:
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
    return digest.digest()


def _arrow_kind(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    if pa.types.is_floating(kind):
        return "float"
    return "string" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else "other"


def work_items(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts grouped by what one opening of a file reads at best cost: a part, a row group or a whole stream."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        key = {"seek": part.name, "stream": "", "group": str(part.group)}[part.access]
        groups.setdefault((part.url, key), []).append(part)
    return list(groups.values())


def read_parts(parts: list[Part], part_bytes: int) -> Iterator[tuple[Part, list[RawRow]]]:
    """The rows of one of `work_items`. Blank lines are no rows.

    Raises:
        UserError: a damaged row group.
    """
    url = parts[0].url
    match parts[0].access:
        case "seek":
            with fsspec.open(url, "rb") as file:
                for part in parts:
                    file.seek(part.start)
                    yield part, _text_rows(part, file.read(part.stop - part.start))
        case "stream":
            wanted = {part.start: part for part in parts}
            start = 0
            for block, _ in _blocks(url, part_bytes):
                if start in wanted:
                    yield wanted[start], _text_rows(wanted[start], block)
                start += len(block)
        case "group":
            with fsspec.open(url, "rb") as file:
                parquet = pq.ParquetFile(file)
                first = sum(parquet.metadata.row_group(g).num_rows for g in range(parts[0].group))
                try:
                    table = parquet.read_row_group(parts[0].group)
                except (OSError, pa.ArrowException) as error:  # planning hashed it without decoding it
                    raise _unreadable(parts[0].label, error) from error
            for part in parts:
                yield part, _table_rows(part, table.slice(part.start - first, part.stop - part.start))


def _text_rows(part: Part, block: bytes) -> list[RawRow]:
    rows = []
    for row, text in enumerate(block.split(b"\n")):
        if part.start == 0 and row == 0:
            text = text.removeprefix(BOM)
        if not text.strip():
            continue
        try:
            value, error = parse_line(text), None
        except RowError as caught:
            value, error = None, caught
        rows.append(RawRow(row, part.first_line + row, text, value, error))
    return rows


def _table_rows(part: Part, table: pa.Table) -> list[RawRow]:
    return [
        RawRow(row, part.first_line + row, json.dumps(value, default=str, ensure_ascii=False).encode(), value, None)
        for row, value in enumerate(table.to_pylist())
    ]


def parse_line(text: bytes) -> dict[str, Any]:
    """One JSON line as a dict; raises `RowError` where it is none."""
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", str(error)) from error
    except RecursionError as error:
        raise RowError("not valid JSON", "nested too deeply") from error
    except ValueError as error:
        raise RowError("not valid JSON", str(error)) from error
    if not isinstance(value, dict):
        raise RowError("not a JSON object", type(value).__name__)
    return value
