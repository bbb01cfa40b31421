"""A seeded sample of input files, without reading them whole. What `init` and `estimate` look at.

Input: files as `input_files.list_files` gives them. Output: chunks of rows near places that are drawn by bytes, each
with its bytes on disk and its weight, so that a total is estimated as (total bytes) · (weighted mean of a chunk's sum
per byte).
"""

import bisect
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from tokenclean_ray.errors import UserError
from tokenclean_ray.json_text import BOM, OpenText, array_elements, open_text, parse_line
from tokenclean_ray.parquet_rows import open_parquet, table_values
from tokenclean_ray.schema import Raw
from tokenclean_ray.source import unreadable
from tokenclean_ray.storage import AT_ONCE, failures, filesystem, open_stretch, side_by_side

NUM_CHUNKS = 48
CHUNK_BYTES = 1 << 16
FEW_ROWS = 12  # near all places: rows are long, and stretches four times as long are looked at
STREAM_BYTES = 1 << 22  # of a compressed file or a JSON array, which can be read from its beginning only
PARQUET_ROWS = 64
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of one file."""

    rows: list[Raw]
    bytes: float
    """On disk."""
    places: float = 1
    """Its weight: how many of the places that were drawn it stands for. Of the rows that begin within a stretch of a
    text, it is their bytes by the stretch's: every row is as likely to begin in one, however long it or its neighbours
    are, so that the sums count, not each stretch's own quotient."""


@dataclass(frozen=True)
class Sample:
    """Chunks of some files."""

    chunks: list[Chunk]
    total: int
    """Bytes of all files."""
    complete: bool
    """Whether every row is in it."""

    @property
    def rows(self) -> list[Raw]:
        """Of all chunks."""
        return [row for chunk in self.chunks for row in chunk.rows]


def sample_files(files: list[tuple[str, str]], seed: int, stretch: int | None = None) -> Sample:
    """Chunks near random places, one in each equal share of the files' bytes; of small inputs everything.

    Args:
        files: (URL, label) pairs.
        stretch: bytes in which the rows of a chunk begin; CHUNK_BYTES, or more where few rows begin in so many.

    Raises:
        UserError: a file cannot be read, the files are empty, or single rows are as long as files.
    """
    stretch = stretch or CHUNK_BYTES
    sizes = _sizes([url for url, _ in files])
    total = sum(sizes)
    rng = random.Random(seed)
    step = total / NUM_CHUNKS
    # closer than two chunks they would overlap, and save little
    places = [(n + rng.random()) * step for n in range(NUM_CHUNKS)] if step > 2 * stretch else []
    begins = list(itertools.accumulate(sizes, initial=0))

    def read(n: int) -> list[Chunk]:
        (url, label), size, begin = files[n], sizes[n], begins[n]
        starts = [int(p - begin) for p in places if begin <= p < begin + size] if places else None
        try:
            found = _chunks(url, size, starts, stretch, random.Random(f"{seed} {n}"))
            return [chunk for chunk in found if chunk.bytes]
        except (OSError, pa.ArrowException, ValueError) as error:
            raise unreadable(label, error) from error

    at_once = 1 if places else AT_ONCE  # of a large Parquet file whole row groups are in memory
    chunks = [chunk for found in side_by_side(read, range(len(files)), at_once) for chunk in found]
    rows = sum(len(chunk.rows) for chunk in chunks)
    if places and rows < FEW_ROWS and step > 8 * stretch:
        return sample_files(files, seed, 4 * stretch)
    if not rows:
        if not places:
            raise UserError(f"{', '.join(label for _, label in files)}: the files hold no rows")
        raise UserError(
            f"no row begins near {len(places)} places in the input: rows are too long to be sampled, or lines are blank"
        )
    return Sample(chunks, total, not places)


def _sizes(urls: list[str]) -> list[int]:
    """Bytes of each file; of a folder of a store from its listing, all of which it would look through for each."""
    listed: dict[str, int | None] = {}
    for folder, count in Counter(url.rpartition("/")[0] for url in urls).items():
        if "://" in folder and count > 1:
            fs, where = filesystem(folder)
            with contextlib.suppress(*failures()):  # a web server gives files, but not always a listing
                listed |= {fs.unstrip_protocol(info["name"]): info["size"] for info in fs.ls(where, detail=True)}
    return [_size(url) if (size := listed.get(url)) is None else int(size) for url in urls]


def _size(url: str) -> int:
    fs, path = filesystem(url)
    return int(fs.size(path))


def _chunks(url: str, size: int, starts: list[int] | None, stretch: int, rng: random.Random) -> Iterator[Chunk]:
    """Chunks of a file; `starts` are bytes to begin near, None for the whole file."""
    if starts == [] or size == 0:
        return
    if url.endswith(".parquet"):
        with open_stretch(url) as raw:
            yield from _parquet_chunks(raw, size, starts, rng)
        return
    with open_text(url, READ_BYTES, whole=starts is None) as text:
        if text.is_compressed or text.is_array:
            chunk = _first_chunk(text, size, None if starts is None else STREAM_BYTES)
            yield chunk if starts is None else replace(chunk, places=len(starts))
        elif starts is None:
            yield _text_chunk(text.file.read(), 0)
        elif size <= stretch:  # too short to have a line after any byte
            yield replace(_text_chunk(text.file.read(), 0), places=len(starts))
        else:
            stop, line = -stretch, 0  # where the next line begins: it may be longer than the way to the next places
            for start in starts:
                # from a stretch before the file on, else its first lines would begin in fewer stretches than others
                begin = max(stop, int(start * (1 + stretch / size)) - stretch)
                stop = begin + stretch
                if line < stop:
                    block, first = _lines_within(text.raw, max(begin, line), stop)
                    line = first + len(block)
                    yield replace(_text_chunk(block, first), places=len(block) * (1 / stretch + 1 / size))


def _lines_within(raw: Any, start: int, stop: int) -> tuple[bytes, int]:
    """The whole lines that begin within [start, stop), and where the first does."""
    raw.seek(max(start - 1, 0))
    if start:
        raw.readline()
    begin = raw.tell()
    block = bytes(raw.read(max(stop - begin, 0)))
    return block + (b"" if block.endswith(b"\n") or not block else raw.readline()), begin


def _text_chunk(block: bytes, start: int) -> Chunk:
    lines = block.removeprefix(BOM if start == 0 else b"").split(b"\n")
    return Chunk([parse_line(line) for line in lines if line.strip()], len(block))


def _first_chunk(text: OpenText, size: int, limit: int | None) -> Chunk:
    """The rows in the first `limit` bytes on disk of a compressed file or a JSON array."""
    raw = text.raw
    if text.is_array:
        found = (parse_line(element.encode("utf-8")) for element in array_elements(text.file, READ_BYTES))
    else:
        found = (parse_line(line) for line in text.file if line.strip())
    rows: list[Raw] = []
    read = 0
    for row in found:
        rows.append(row)
        if limit is not None and limit <= raw.tell() < size:
            return Chunk(rows, read or raw.tell())  # what was just read lies ahead of this row
        read = raw.tell()
    return Chunk(rows, size)


def _parquet_chunks(raw: Any, size: int, starts: list[int] | None, rng: random.Random) -> Iterator[Chunk]:
    file = open_parquet(raw)
    count = file.metadata.num_rows
    if starts is None:
        yield Chunk(table_values(file.read()), size)
        return
    if not count:
        return
    ends = list(itertools.accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)))
    hits = Counter(bisect.bisect_right(ends, start / size * count) for start in starts)
    for group, number in hits.items():
        batches = -(-file.metadata.row_group(group).num_rows // PARQUET_ROWS)
        wanted = set(rng.sample(range(batches), min(number, batches)))
        for n, batch in enumerate(file.iter_batches(PARQUET_ROWS, row_groups=[group])):
            if n in wanted:
                yield Chunk(table_values(pa.table(batch)), batch.num_rows * size / count, number / len(wanted))
