"""Input files → parts → rows.

Input: paths, folders, globs or hub datasets. Output: a list of `Part`s, the same on any machine for the same
input, and the raw rows of each. A text file (JSON lines, a JSON array, either compressed) is cut at multiples of
`part_bytes` moved to line ends; a Parquet file at its row groups, large ones divided.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean_ray.config import UserError, nearest, redact
from tokenclean_ray.layout import absolute, is_local
from tokenclean_ray.schema import check_plain

TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BOM = b"\xef\xbb\xbf"
MAGIC = {
    b"\x1f\x8b": "it is gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "it is zstd: let its name end in .zst",
    b"PAR1": "it is Parquet: let its name end in .parquet",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}
SAMPLE_ROWS = 100  # of each file, to find the types of the carried columns
MAX_DEPTH = 100  # of nested lists and objects: templates recurse, and how deep they can depends on their caller
CHUNK = 1 << 20
MAX_ELEMENT = 1 << 28  # characters of an element of a JSON array; a syntax error is sought no further
SPACE = re.compile(r"[ \t\r\n]*")
SEPARATOR = re.compile(r"[ \t\r\n]*([,\]])")


class RowError(ValueError):
    """A row that cannot be used: a short reason, which becomes a counter, and what exactly was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class BadFile(ValueError):
    """A file that is not what its name says, or a JSON array that is none."""


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
    digest: str
    """Of the range's bytes, or of its row group's, as they were planned."""
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


def list_files(paths: Iterable[str], key: str = "") -> list[tuple[str, str]]:
    """(absolute URL, label) of every input file, each once, sorted by label.

    Args:
        key: of the config, that gives the paths; for errors.

    Raises:
        UserError: a path that matches nothing or a file of an unknown kind.
    """
    found: dict[str, str] = {}
    for path in paths:
        for url, label in _match(path, f"{key} {path}".strip()):
            # names of other encodings have bytes that are no text, of which rows could not tell
            found.setdefault(url, os.fsencode(label).decode("utf-8", "backslashreplace"))
    return sorted(found.items(), key=lambda item: (item[1], item[0]))


def _match(path: str, named: str) -> list[tuple[str, str]]:
    # hf://datasets/… and s3://… keep their scheme; a local path is shown as the user wrote it
    try:
        fs, root = fsspec.core.url_to_fs(absolute(path))
        files = [f for f in _found(fs, root, path) if _is_data(f)]
        wrong = "" if files else _nothing_found(fs, root, path)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{named}: {error}") from error
    if wrong:
        raise UserError(f"{named}{wrong}")
    if is_local(fs) and (odd := [f for f in files if not os.path.isfile(f)]):
        raise UserError(f"{named}: {odd[0]} is a broken link, a pipe or the like: mend or leave it out")
    if "://" in path:
        return [(url, redact(url)) for url in map(fs.unstrip_protocol, files)]
    return [(f, f if os.path.isabs(path) else os.path.relpath(f)) for f in files]


def _found(fs: Any, root: str, path: str) -> list[str]:
    """What a path, a folder or a glob stands for, hidden files left out; `root`: the path as the filesystem has it."""
    if _is_glob(path) and not fs.exists(root):
        if is_local(fs):  # relative to this folder, whose own name may look like a glob
            found = glob.glob(os.path.expanduser(path).removeprefix("file://"), recursive=True)
            files = [os.path.abspath(f) for f in found if not os.path.isdir(f)]
        else:
            kinds = fs.glob(root, detail=True)
            files = [f for f in kinds if kinds[f]["type"] != "directory"]
        return [f for f in files if not _hidden(f.rpartition("/")[2])]
    if fs.isdir(root):
        files = _walk(root) if is_local(fs) else fs.find(root)
        return [f for f in files if not _hidden(f[len(root) :])]
    return [root] if fs.exists(root) or (is_local(fs) and os.path.islink(root)) else []


def _walk(root: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # fsspec passes over a folder that it cannot list

    return [os.path.join(folder, name) for folder, _, names in os.walk(root, onerror=fail) for name in names]


def _nothing_found(fs: Any, root: str, path: str) -> str:
    if fs.isfile(root):
        return f": unknown kind of file; known are {', '.join(SUFFIXES)}, also .gz, .zst"
    if _is_glob(path) or fs.exists(root):
        return f" matches no file that ends in {', '.join(SUFFIXES)} (also .gz, .zst)"
    folder, _, name = root.rpartition("/")
    names = [f.rpartition("/")[2] for f in fs.ls(folder, detail=False)] if fs.isdir(folder) else []
    return f" does not exist{nearest(name, names)}"


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


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
    except (OSError, pa.ArrowException, ValueError) as error:
        raise unreadable(label, error) from error


def unreadable(label: str, error: Exception) -> UserError:
    """The error that names a file and what is wrong with it."""
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"{label} cannot be read ({why}): mend or leave out the file")


def _digest(block: bytes) -> str:
    return hashlib.blake2b(block, digest_size=16).hexdigest()


def _name(encoding: str, label: str, start: int, stop: int, digest: str) -> str:
    whole = hashlib.blake2b(digest_size=8)
    place = f"{start}-{stop}".encode()
    for piece in (encoding.encode(), label.encode("utf-8", "surrogateescape"), place, bytes.fromhex(digest)):
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
            digest = _digest(block)
            name = _name(encoding, label, start, stop, digest)
            parts.append(Part(name, url, label, start, stop, line, access, digest))
        if line <= SAMPLE_ROWS:
            for text in block.removeprefix(BOM).split(b"\n", SAMPLE_ROWS)[:SAMPLE_ROWS]:
                _note_kinds(text, extra, kinds)
        start += len(block)
        line += block.count(b"\n")
    return {"parts": parts, "kinds": {column: sorted(seen) for column, seen in kinds.items()}}


def _blocks(url: str, part_bytes: int) -> Iterator[tuple[bytes, Literal["seek", "stream"]]]:
    """The file's text as JSON lines, cut at multiples of part_bytes moved to line ends; and how to get there again."""
    with open_text(url) as text:
        if text.is_array:
            yield from ((block, "stream") for block in _array_blocks(text.file, part_bytes))
            return
        position = 0
        while block := text.file.read(part_bytes - position % part_bytes):
            if not block.endswith(b"\n"):
                block += text.file.readline()
            position += len(block)
            yield block, "stream" if text.is_compressed else "seek"


@dataclass(frozen=True)
class OpenText:
    """A text file that is open: JSON lines or a JSON array."""

    raw: Any
    """As it lies on disk."""
    file: io.BufferedReader
    """Uncompressed, at its beginning."""
    is_compressed: bool
    is_array: bool


@contextlib.contextmanager
def open_text(url: str, buffer: int = CHUNK) -> Iterator[OpenText]:
    """Open a text file.

    Args:
        buffer: bytes to read ahead, uncompressed.

    Raises:
        BadFile: it is of another kind than its name says.
    """
    compression = _compression(url)
    with fsspec.open(url, "rb") as raw:
        # Arrow's, because zstandard's own reader takes a file cut short for one that ends there
        file = io.BufferedReader(pa.CompressedInputStream(raw, compression) if compression else raw, buffer)
        for magic, what in MAGIC.items():
            if file.peek(4).startswith(magic):
                raise BadFile(what)
        is_array = file.peek(64)[:64].removeprefix(BOM).lstrip()[:1] == b"["
        yield OpenText(raw, file, compression is not None, is_array)


def _array_blocks(file: io.BufferedReader, part_bytes: int) -> Iterator[bytes]:
    block = bytearray()
    for element in array_elements(file):
        # between tokens alone can there be line ends: within a string JSON wants them escaped
        block += element.replace("\r", " ").replace("\n", " ").encode("utf-8") + b"\n"
        if len(block) >= part_bytes:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def array_elements(file: io.BufferedReader, read_chars: int = CHUNK) -> Iterator[str]:
    """The text of each element of a JSON array; streamed, so that the array need not fit the memory.

    Args:
        read_chars: characters to read at a time, at least.

    Raises:
        BadFile: it is no array, or breaks off.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    decode = json.JSONDecoder().raw_decode
    buffer, count = text.read(read_chars), 0
    at = buffer.index("[") + 1
    while True:
        space = SPACE.match(buffer, at)
        assert space is not None  # it matches no space at all, too
        start = space.end()
        after, why = None, "no comma after it"
        try:
            _, end = decode(buffer, start)
            after = SEPARATOR.match(buffer, end)
        except RecursionError:
            raise BadFile(f"element {count + 1} is nested too deeply") from None
        except ValueError as error:  # it is wrong, or the buffer holds a part of it
            why = str(error).partition(": line ")[0]
        if after:
            yield buffer[start:end]
            count, at = count + 1, after.end()
            if after[1] == "]":
                break
        elif count == 0 and buffer[start : start + 1] == "]":
            at = start + 1
            break
        else:
            more = text.read(max(read_chars, len(buffer) - start)) if len(buffer) - start < MAX_ELEMENT else ""
            if not more:
                raise BadFile(f"element {count + 1}: {why}")
            buffer, at = buffer[start:] + more, 0
    rest = buffer[at:]
    while rest:
        if not rest.isspace():
            raise BadFile("text after the array's end")
        rest = text.read(read_chars)


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
        parquet = open_parquet(file)
        first = 0
        for group in range(parquet.num_row_groups):
            meta = parquet.metadata.row_group(group)
            digest = _group_digest(file, meta, parquet.schema_arrow)
            size = max(1, -(-meta.num_rows * part_bytes // max(meta.total_byte_size, 1)))
            for start in range(first, first + meta.num_rows, size):
                stop = min(start + size, first + meta.num_rows)
                name = _name(encoding, label, start, stop, digest)
                parts.append(Part(name, url, label, start, stop, start + 1, "group", digest, group))
            first += meta.num_rows
        schema = parquet.schema_arrow
    kinds = {c: [_arrow_kind(schema.field(c).type)] for c in extra if c in schema.names}
    return {"parts": parts, "kinds": kinds}


def open_parquet(file: Any) -> pq.ParquetFile:
    """A Parquet file's reader; raises `ValueError` where reading values would unpickle something."""
    parquet = pq.ParquetFile(file)
    check_plain(parquet.schema_arrow)
    return parquet


def _group_digest(file: Any, meta: Any, columns_and_types: pa.Schema) -> str:
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


def _arrow_kind(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    if pa.types.is_floating(kind):
        return "float"
    return "string" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else "other"


def work_items(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts grouped so that each group is read by one opening of its file: a part, a row group or a whole stream."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        key = {"seek": part.name, "stream": "", "group": str(part.group)}[part.access]
        groups.setdefault((part.url, key), []).append(part)
    return list(groups.values())


def read_parts(parts: list[Part], part_bytes: int) -> Iterator[tuple[Part, list[RawRow]]]:
    """The rows of one of `work_items`. Blank lines are no rows.

    Raises:
        UserError: a damaged row group; a file that is another one than was planned.
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
                parquet = _planned(file, parts[0])
                first = sum(parquet.metadata.row_group(g).num_rows for g in range(parts[0].group))
                try:
                    table = parquet.read_row_group(parts[0].group)
                except (OSError, pa.ArrowException) as error:  # planning hashed it without decoding it
                    raise unreadable(parts[0].label, error) from error
            for part in parts:
                yield part, _table_rows(part, table.slice(part.start - first, part.stop - part.start))


def usable_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of some files that can be read, in order: for what is no run and keeps no parts."""
    for url, label in list_files([path]):
        for parts in work_items(plan_file(url, label, CHUNK, "", [])["parts"]):
            for _, rows in read_parts(parts, CHUNK):
                yield from (row.value for row in rows if row.value is not None)


def _planned(file: Any, part: Part) -> pq.ParquetFile:
    """A Parquet file whose row group holds what was planned."""
    try:
        parquet = open_parquet(file)
        found = _group_digest(file, parquet.metadata.row_group(part.group), parquet.schema_arrow)
    except (OSError, pa.ArrowException, ValueError, IndexError) as error:
        raise _changed(part) from error
    if found != part.digest:
        raise _changed(part)
    return parquet


def _changed(part: Part) -> UserError:
    """What is read must be what the part is named after, for a part that is there is never made again."""
    return UserError(f"{part.label} changed while it was read: run the same command again")


def _text_rows(part: Part, block: bytes) -> list[RawRow]:
    if _digest(block) != part.digest:
        raise _changed(part)
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


VALUE_ERRORS = (ValueError, TypeError, OverflowError, pa.ArrowException)


def _table_rows(part: Part, table: pa.Table) -> list[RawRow]:
    return [_table_row(row, part.first_line + row, value) for row, value in enumerate(table_values(table))]


def _table_row(row: int, line: int, value: dict[str, Any] | RowError) -> RawRow:
    if isinstance(value, RowError):
        return RawRow(row, line, b"", None, value)
    try:
        return RawRow(row, line, json.dumps(value, default=str, ensure_ascii=False).encode(), value, None)
    except VALUE_ERRORS as error:
        return RawRow(row, line, b"", None, RowError("a value cannot be read", str(error)))


def table_values(table: pa.Table) -> list[dict[str, Any] | RowError]:
    """Each row of a table, or why it cannot be read."""
    try:
        return list(table.to_pylist(maps_as_pydicts="lossy"))  # as in JSON, the last of two equal keys
    except VALUE_ERRORS as error:
        if table.num_rows > 1:
            return [value for at in range(table.num_rows) for value in table_values(table.slice(at, 1))]
        return [
            RowError("not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value cannot be read", str(error))
        ]


def parse_line(text: bytes) -> dict[str, Any]:
    """One JSON line as a dict; raises `RowError` where it is none."""
    try:
        value = parse_json(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", str(error)) from error
    except ValueError as error:
        raise RowError("not valid JSON", str(error)) from error
    if not isinstance(value, dict):
        raise RowError("not a JSON object", type(value).__name__)
    return value


def parse_json(text: str) -> Any:
    """A JSON text's value; raises `ValueError` where it is none, or deeper than `MAX_DEPTH`."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    depth, level = 0, [value]
    if text.count("[") + text.count("{") > MAX_DEPTH:
        while level := [inner for outer in level for inner in _inner(outer)]:
            depth += 1
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    return value


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
