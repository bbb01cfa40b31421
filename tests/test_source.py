"""Parts cover every file exactly once, with the right line numbers, and their names follow the content."""

import gzip
import itertools
import json
import os
import tempfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenclean_ray.errors import UserError
from tokenclean_ray.input_files import list_files
from tokenclean_ray.json_text import BOM, MAGIC
from tokenclean_ray.sampling import NUM_CHUNKS, sample_files
from tokenclean_ray.schema import RowError
from tokenclean_ray.source import plan_file, read_parts, work_items
from tokenclean_ray.storage import AHEAD

PART_BYTES = 1024


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,  # as the zstd command does
}


def json_lines(count=100, end=b"\n") -> list[bytes]:
    return [json.dumps({"n": n, "text": "é" * (n % 40)}, ensure_ascii=False).encode() + end for n in range(count)]


def put(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def parts_of(url, part_bytes=PART_BYTES, encoding="e"):
    return plan_file(url, "label", part_bytes, encoding)


def names(url, **options) -> list[str]:
    return [part.name for part in parts_of(url, **options)]


def read(parts, part_bytes=PART_BYTES):
    """Every row in the file's order; each part is read once, its rows numbered by their place in it."""
    found = {}
    for item in work_items(parts):
        for part, rows in read_parts(item, part_bytes):
            assert part not in found
            assert len({row.row for row in rows}) == len(rows)
            assert all(row.line == part.first_line + row.row for row in rows)
            found[part] = rows
    assert set(found) == set(parts)
    return [row for part in parts for row in found[part]]


def numbered(rows):
    return [(row.line, row.value) for row in rows]


def expected(content: bytes):
    lines = content.removeprefix(BOM).split(b"\n")
    return [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]


CONTENTS = {
    "final newline": b"".join(json_lines()),
    "no final newline": b"".join(json_lines()).rstrip(b"\n"),
    "CRLF": b"".join(json_lines(end=b"\r\n")),
    "blank lines": b"\n \n" + b"\n\r\n  \n".join(json_lines()),
    "blank stretch longer than a part": b"".join([*json_lines(5), b"\n" * 5000, *json_lines(5)]),
    "BOM": BOM + b"".join(json_lines()),
    "lines longer than a part": b"".join(json.dumps({"text": "x" * 1500 * n}).encode() + b"\n" for n in range(5)),
    "lines that end with a part": b"".join(json.dumps({"t": "x" * (511 - 9)}).encode() + b"\n" for _ in range(8)),
    "one line": b'{"n": 1}',
    "nothing": b"",
    "only blanks": b"\n\n  \n",
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_text_is_covered_once(tmp_path, kind, suffix):
    url = put(tmp_path / f"rows.jsonl{suffix}", COMPRESS[suffix](CONTENTS[kind]))
    parts = parts_of(url)
    assert numbered(read(parts)) == expected(CONTENTS[kind])
    ranges = [(part.start, part.stop) for part in parts]
    assert ranges == sorted(ranges)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ranges))
    assert len({part.name for part in parts}) == len(parts)
    assert names(url) == [part.name for part in parts]
    if len(CONTENTS[kind].strip()) > 4 * PART_BYTES:
        assert len(parts) > 1


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.one_of(st.binary(max_size=300), st.text(" \t\r", max_size=3).map(str.encode)), max_size=60),
    ended=st.booleans(),
    part_bytes=st.integers(1024, 4096),
    suffix=st.sampled_from(sorted(COMPRESS)),
)
def test_any_bytes_are_covered_once(lines, ended, part_bytes, suffix):
    content = b"\n".join(lines) + b"\n" * ended
    assume(not content.startswith((BOM, *MAGIC)) and content.lstrip()[:1] != b"[")
    with tempfile.TemporaryDirectory() as folder:
        url = os.path.join(folder, f"rows.jsonl{suffix}")
        with open(url, "wb") as file:
            file.write(COMPRESS[suffix](content))
        rows = read(parts_of(url, part_bytes=part_bytes), part_bytes)
    wanted = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [(row.line, row.text) for row in rows] == wanted
    assert all(isinstance(row.value, dict | RowError) for row in rows)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_joined_streams(tmp_path, suffix):
    """What `cat a.gz b.gz` and parallel compressors write."""
    halves = [b"".join(json_lines(50)), b"".join(json_lines(70))]
    url = put(tmp_path / f"rows.jsonl{suffix}", b"".join(map(COMPRESS[suffix], halves)))
    assert numbered(read(parts_of(url))) == expected(b"".join(halves))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("before", [b"", b" \r\n\t", BOM, BOM + b"\n "], ids=["", "space", "BOM", "BOM and space"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path, before, suffix, indent):
    values = [{"n": n, "x": 0.1, "text": "é\n" * 20} for n in range(60)]
    content = before + json.dumps(values, indent=indent).encode()
    parts = parts_of(put(tmp_path / f"rows.json{suffix}", COMPRESS[suffix](content)))
    assert len(parts) > 1
    assert numbered(read(parts)) == list(enumerate(values, 1))


def test_array_of_anything(tmp_path):
    rows = read(parts_of(put(tmp_path / "rows.json", b'[{"a": 1}, 2, null]')))
    assert rows[0].value == {"a": 1}
    assert [row.value.reason for row in rows[1:]] == ["not a JSON object"] * 2


@pytest.fixture
def parquet(tmp_path):
    """(url, values): row groups of 200, 200 and 50 rows, of several parts each."""
    values = [{"n": n, "messages": [{"role": "user", "content": "x" * (n % 50)}]} for n in range(450)]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(values), path, row_group_size=200)
    return path, values


def test_parquet_is_covered_once(parquet):
    url, values = parquet
    parts = parts_of(url)
    assert numbered(read(parts)) == list(enumerate(values, 1))
    assert [part.group for part in parts] == sorted(part.group for part in parts)
    assert {part.group for part in parts} == {0, 1, 2}
    assert len(parts) > 4
    assert [item[0].group for item in work_items(parts_of(url, part_bytes=256))] == [0, 1, 2]  # large ones are apart
    assert [len(item) for item in work_items(parts_of(url, part_bytes=1 << 20))] == [3]  # small ones share an opening


def test_streams_are_read_once_and_seekable_parts_apart(tmp_path):
    content = CONTENTS["final newline"]
    assert len(work_items(parts_of(put(tmp_path / "a.jsonl.gz", gzip.compress(content))))) == 1
    plain = parts_of(put(tmp_path / "a.jsonl", content))
    assert [[part] for part in plain] == work_items(plain)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_some_parts_alone(tmp_path, suffix):
    """What a resumed run reads."""
    parts = parts_of(put(tmp_path / f"rows.jsonl{suffix}", COMPRESS[suffix](CONTENTS["final newline"])))
    lines = [row.line for row in read([parts[1], parts[-1]])]
    second, third, last = parts[1].first_line, parts[2].first_line, parts[-1].first_line
    assert lines == [*range(second, third), *range(last, 101)]


def test_a_changed_byte_renames_its_part_alone(tmp_path):
    content = bytearray(CONTENTS["final newline"])
    path = tmp_path / "rows.jsonl"
    before = names(put(path, bytes(content)))
    place = content.index(b'"n": 50') + 5
    content[place : place + 2] = b"51"
    after = names(put(path, bytes(content)))
    assert len(before) == len(after) > 3
    assert [a == b for a, b in zip(after, before, strict=True)].count(False) == 1


def test_swapped_lines_rename_their_parts_alone(tmp_path):
    """Cuts lie near multiples of part_bytes, so a line end that moves does not move all later parts."""
    lines = json_lines()
    path = tmp_path / "rows.jsonl"
    before = set(names(put(path, b"".join(lines))))
    for n in range(len(lines) - 1):
        swapped = [*lines[:n], lines[n + 1], lines[n], *lines[n + 2 :]]
        assert len(set(names(put(path, b"".join(swapped)))) - before) in (1, 2)


def test_appended_lines_leave_earlier_names(tmp_path):
    content = CONTENTS["final newline"]
    path = tmp_path / "rows.jsonl"
    before = names(put(path, content))
    after = names(put(path, content + b"".join(json_lines())))
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) > len(before)


def test_names_hold_encoding_and_label(tmp_path):
    url = put(tmp_path / "rows.jsonl", CONTENTS["final newline"])
    other_label = {part.name for part in plan_file(url, "other", PART_BYTES, "e")}
    assert not set(names(url)) & set(names(url, encoding="f"))
    assert not set(names(url)) & other_label


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_part_bytes_never_reuse_a_name_for_other_rows(tmp_path, parquet, kind):
    url = parquet[0] if kind == "parquet" else put(tmp_path / "rows.jsonl", CONTENTS["final newline"])
    ranges = {}
    for part_bytes in (1024, 1500, 2048, 1 << 20):
        for part in parts_of(url, part_bytes=part_bytes):
            assert ranges.setdefault(part.name, (part.start, part.stop)) == (part.start, part.stop)


def test_memory_filesystem():
    with fsspec.open("memory://source/rows.jsonl", "wb") as file:
        file.write(CONTENTS["final newline"])
    ((url, label),) = list_files(["memory://source/*.jsonl"])
    assert label == url == "memory:///source/rows.jsonl"
    assert numbered(read(parts_of(url))) == expected(CONTENTS["final newline"])


# ---- damaged files


def flipped(data: bytes) -> bytes:
    damaged = bytearray(data)
    middle = len(data) // 2
    damaged[middle : middle + 8] = bytes(byte ^ 0xFF for byte in damaged[middle : middle + 8])
    return bytes(damaged)


@pytest.mark.parametrize("damage", [flipped, lambda d: d[: len(d) // 2], lambda d: d[:-3], lambda d: b"no " + d])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression(tmp_path, suffix, damage):
    content = b"".join(os.urandom(30).hex().encode() + b"\n" for _ in range(2000))
    url = put(tmp_path / f"rows.jsonl{suffix}", damage(COMPRESS[suffix](content)))
    with pytest.raises(UserError, match=r"^label cannot be read \([^\n]*\): mend or leave out the file$"):
        parts_of(url)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_truncated_parquet(tmp_path, parquet, keep):
    with open(parquet[0], "rb") as file:
        data = file.read()
    url = put(tmp_path / "cut.parquet", data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(UserError, match=r"^label cannot be read"):
        parts_of(url)


def test_damaged_row_group(tmp_path, parquet):
    with open(parquet[0], "rb") as file:
        data = bytearray(file.read())
    data[4:64] = b"\xff" * 60
    parts = parts_of(put(tmp_path / "damaged.parquet", bytes(data)))  # the footer is whole
    with pytest.raises(UserError, match=r"^label cannot be read"):
        read(parts)


def test_bad_lines_keep_their_number_and_text(tmp_path):
    rows = read(parts_of(put(tmp_path / "rows.jsonl", b'{"a": 1}\n\n{broken\r\n{"a": "\xff"}\n')))
    assert [(row.line, row.value.reason, row.text) for row in rows if isinstance(row.value, RowError)] == [
        (3, "not valid JSON", b"{broken\r"),
        (4, "not UTF-8", b'{"a": "\xff"}'),
    ]


# ---- which files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
@pytest.mark.parametrize("how", ["shorter", "other", "empty"])
def test_a_file_that_is_another_by_now_is_not_read_under_the_old_names(tmp_path, name, how):
    def content(rows):
        if name.endswith(".parquet"):
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=40)
            return sink.getvalue().to_pybytes()
        lines = [json.dumps(row).encode() for row in rows]
        text = b"[" + b",".join(lines) + b"]" if name.endswith(".json") else b"\n".join([*lines, b""])
        return gzip.compress(text) if name.endswith(".gz") else text

    rows = [{"n": n, "text": "x" * 20} for n in range(100)]
    url = put(tmp_path / name, content(rows))
    parts = parts_of(url)
    planned = {part: numbered(found) for item in work_items(parts) for part, found in read_item(item)}
    assert len(planned) == len(parts) > 1
    rows = {"shorter": rows[:30], "other": [row | {"text": "y" * 20} for row in rows], "empty": []}[how]
    put(tmp_path / name, b"" if name.endswith(".parquet") and not rows else content(rows))
    still, refused = {}, []
    for item in work_items(parts):
        try:
            still |= {part: numbered(found) for part, found in read_item(item)}
        except UserError as error:
            refused.append(str(error))
    assert all("changed while it was read: run the same command again" in what for what in refused)
    assert still.items() <= planned.items()
    assert len(still) < len(parts)  # `run.encode` says so where a stream ends before them
    assert not (how == "other" and still)
    assert refused or name != "a.jsonl"


def read_item(item):
    return list(read_parts(item, PART_BYTES))


def test_a_part_of_a_large_file_of_an_object_store_fetches_little_more(bucket, monkeypatch):
    fetched = []
    fetch = s3fs.S3File._fetch_range
    monkeypatch.setattr(s3fs.S3File, "_fetch_range", lambda file, a, b: fetched.append(b - a) or fetch(file, a, b))
    line = json.dumps({"prompt": "a" * 500, "completion": "b" * 500}).encode() + b"\n"
    fs, where = fsspec.core.url_to_fs(f"{bucket}/big.jsonl")
    fs.pipe_file(where, line * 8000)
    table = pa.table({"prompt": [str(n) * 100 for n in range(20_000)], "completion": ["b"] * 20_000})
    with fs.open(where.replace("jsonl", "parquet"), "wb") as file:
        pq.write_table(table, file, row_group_size=2000, use_dictionary=False, compression="none")
    for suffix in ("jsonl", "parquet"):
        parts = plan_file(f"{bucket}/big.{suffix}", "big", 1 << 20, "")
        fetched.clear()
        for part in parts[:3]:
            assert [found for found, _ in read_parts([part], 1 << 20)] == [part]
        assert sum(fetched) < 3 * (1 << 20) * 1.5
    fetched.clear()
    sample_files([(f"{bucket}/big.jsonl", "big")], 0)
    assert sum(fetched) < NUM_CHUNKS * 3 * AHEAD
