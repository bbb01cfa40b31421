"""JSON as it lies on disk: lines or an array, either compressed; and the values of its rows."""

import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa

from tokenclean_ray.schema import Raw, RowError
from tokenclean_ray.storage import open_stretch

TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BOM = b"\xef\xbb\xbf"
MAGIC = {
    b"\x1f\x8b": "it is gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "it is zstd: let its name end in .zst",
    b"PAR1": "it is Parquet: let its name end in .parquet",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}
MAX_DEPTH = 100  # of nested lists and objects: templates recurse, and how deep they can depends on their caller
CHUNK = 1 << 20
MAX_ELEMENT = 1 << 28  # characters of an element of a JSON array; a syntax error is sought no further
SPACE = re.compile(r"[ \t\r\n]*")
SEPARATOR = re.compile(r"[ \t\r\n]*([,\]])")


class BadFile(ValueError):
    """A file that is not what its name says, or a JSON array that is none."""


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
def open_text(url: str, buffer: int = CHUNK, whole: bool = True) -> Iterator[OpenText]:
    """Open a text file.

    Args:
        buffer: bytes to read ahead, uncompressed.
        whole: it is read to its end.

    Raises:
        BadFile: it is of another kind than its name says.
    """
    compression = next((name for suffix, name in COMPRESSIONS.items() if url.endswith(suffix)), None)
    with fsspec.open(url, "rb") if whole else open_stretch(url) as raw:
        # Arrow's, because zstandard's own reader takes a file cut short for one that ends there
        file = io.BufferedReader(pa.CompressedInputStream(raw, compression) if compression else raw, buffer)
        for magic, what in MAGIC.items():
            if file.peek(4).startswith(magic):
                raise BadFile(what)
        is_array = file.peek(64)[:64].removeprefix(BOM).lstrip()[:1] == b"["
        yield OpenText(raw, file, compression is not None, is_array)


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


def parse_line(text: bytes) -> Raw:
    """One JSON line as a dict, or why it is none."""
    try:
        value = parse_json(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", str(error))
    except ValueError as error:
        return RowError("not valid JSON", str(error))
    return value if isinstance(value, dict) else RowError("not a JSON object", type(value).__name__)


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


def parsed(value: Any) -> Any:
    """What a JSON text says; any other value as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    return value


def as_json(value: Any) -> str:
    """A value as JSON text in the characters that it is written in."""
    return json.dumps(value, ensure_ascii=False)


def without_nulls(value: Any) -> Any:
    """Parquet fills absent fields with null: each call of a tool would have the arguments of all tools."""
    match value:
        case dict():
            return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
        case list():
            return [without_nulls(inner) for inner in value]
    return value


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
