"""Input files → parts → rows.

Input: files as `input_files.list_files` gives them. Output: a list of `Part`s, the same on any machine for the same
input, and the raw rows of each. A text file (JSON lines, a JSON array, either compressed) is cut at multiples of
`part_bytes` moved to line ends; a Parquet file at its row groups, large ones divided.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tokenclean_ray.errors import UserError
from tokenclean_ray.input_files import list_files
from tokenclean_ray.json_text import BOM, array_elements, open_text, parse_line
from tokenclean_ray.parquet_rows import VALUE_ERRORS, group_digest, open_parquet, table_values
from tokenclean_ray.schema import Raw, RowError
from tokenclean_ray.storage import open_stretch

PLAN_BYTES = 1 << 20  # of a part, where none is kept
MOST_PARTS = 8  # of a Parquet file, of several row groups, that are read by one opening


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
    """How it is read: at its offset; by passing over the file (compressed, or a JSON array); in its row group."""
    digest: str
    """Of the range's bytes, or of its row group's, as they were planned."""
    group: int = -1
    """Parquet: the row group."""


@dataclass(frozen=True)
class RawRow:
    """A row as read, and where it was."""

    row: int
    line: int
    text: bytes
    value: Raw


def plan_file(url: str, label: str, part_bytes: int, encoding: str) -> list[Part]:
    """Cut one file into parts; reads it once, from end to end.

    Args:
        encoding: fingerprint of everything that decides how a row becomes tokens; it enters the parts' names.

    Raises:
        UserError: the file cannot be read.
    """
    plan = _plan_parquet if url.endswith(".parquet") else _plan_text
    try:
        return plan(url, label, part_bytes, encoding)
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


def _plan_text(url: str, label: str, part_bytes: int, encoding: str) -> list[Part]:
    parts = []
    start, line = 0, 1
    access: Literal["seek", "stream"] = "seek"
    for block, access in _blocks(url, part_bytes):
        if block.strip():
            stop = start + len(block)
            digest = _digest(block)
            name = _name(encoding, label, start, stop, digest)
            parts.append(Part(name, url, label, start, stop, line, access, digest))
        start += len(block)
        line += block.count(b"\n")
    return parts


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


def _plan_parquet(url: str, label: str, part_bytes: int, encoding: str) -> list[Part]:
    parts = []
    with fsspec.open(url, "rb") as file:
        parquet = open_parquet(file)
        first = 0
        for group in range(parquet.num_row_groups):
            meta = parquet.metadata.row_group(group)
            digest = group_digest(file, meta, parquet.schema_arrow)
            size = max(1, -(-meta.num_rows * part_bytes // max(meta.total_byte_size, 1)))
            for start in range(first, first + meta.num_rows, size):
                stop = min(start + size, first + meta.num_rows)
                name = _name(encoding, label, start, stop, digest)
                parts.append(Part(name, url, label, start, stop, start + 1, "group", digest, group))
            first += meta.num_rows
    return parts


def work_items(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts grouped so that each group is read by one opening of its file: a part, a few row groups or a stream."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        key = {"seek": part.name, "stream": "", "group": str(part.group)}[part.access]
        groups.setdefault((part.url, key), []).append(part)
    items: list[list[Part]] = []
    for group in groups.values():
        before = items[-1] if items else []
        near = before and group[0].access == before[0].access == "group" and group[0].url == before[0].url
        # each opening of a Parquet file parses a footer that tells of all row groups
        if near and len(before) + len(group) <= MOST_PARTS:
            before += group
        else:
            items.append(group)
    return items


def read_parts(parts: list[Part], part_bytes: int) -> Iterator[tuple[Part, list[RawRow]]]:
    """The rows of one of `work_items`. Blank lines are no rows.

    Raises:
        UserError: a damaged row group; a file that is another one than was planned.
    """
    url = parts[0].url
    match parts[0].access:
        case "seek":
            with open_stretch(url) as file:
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
            with open_stretch(url) as file:
                try:
                    parquet = open_parquet(file)
                except (OSError, pa.ArrowException, ValueError) as error:
                    raise _changed(parts[0]) from error
                groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
                firsts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))
                for _, members in itertools.groupby(parts, key=lambda part: part.group):
                    yield from _group_rows(file, parquet, firsts, list(members))


def usable_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of some files that can be read, in order: for what is no run and keeps no parts."""
    for url, label in list_files([path]):
        for parts in work_items(plan_file(url, label, PLAN_BYTES, "")):
            for _, rows in read_parts(parts, PLAN_BYTES):
                yield from (row.value for row in rows if isinstance(row.value, dict))


def _group_rows(
    file: Any, parquet: pq.ParquetFile, firsts: list[int], parts: list[Part]
) -> Iterator[tuple[Part, list[RawRow]]]:
    """The rows of a row group's parts, where it holds what was planned; `firsts`: the first row of each group."""
    group = parts[0].group
    try:
        found = group_digest(file, parquet.metadata.row_group(group), parquet.schema_arrow)
    except (OSError, pa.ArrowException, ValueError, IndexError) as error:
        raise _changed(parts[0]) from error
    if found != parts[0].digest:
        raise _changed(parts[0])
    try:
        table = parquet.read_row_group(group)
    except (OSError, pa.ArrowException) as error:  # planning hashed it without decoding it
        raise unreadable(parts[0].label, error) from error
    for part in parts:
        values = table_values(table.slice(part.start - firsts[group], part.stop - part.start))
        yield part, [_table_row(row, part.first_line + row, value) for row, value in enumerate(values)]


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
        rows.append(RawRow(row, part.first_line + row, text, parse_line(text)))
    return rows


def _table_row(row: int, line: int, value: Raw) -> RawRow:
    if isinstance(value, RowError):
        return RawRow(row, line, b"", value)
    try:
        return RawRow(row, line, json.dumps(value, default=str, ensure_ascii=False).encode(), value)
    except VALUE_ERRORS as error:
        return RawRow(row, line, b"", RowError("a value cannot be read", str(error)))
