"""Bad and strange files, kind by kind: read, or one line that says what to mend. Rows: `test_bad_input`."""

import gzip
import io
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_bad_input import (
    ENCODERS,
    END,
    GOOD,
    MARKER,
    NO_COLUMNS,
    PART_BYTES,
    SURROGATE,
    calls,
    ingest,
    nested,
    says,
)

from tokenclean_ray.errors import UserError
from tokenclean_ray.input_files import list_files
from tokenclean_ray.json_text import BOM
from tokenclean_ray.source import plan_file


def parquet(table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), sink)
    return sink.getvalue()


def broken_utf8() -> pa.Array:
    return pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"], pa.binary()).buffers())


THREE = b"\n".join([GOOD] * 3)
ARRAY = json.dumps([says("the fox")] * 3).encode()
TABLE = [says("the fox") | {"id": n} for n in range(3)]
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress
ARGUMENTS = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
CALLS = pa.schema([("messages", pa.list_(pa.struct([
    ("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.struct([("function", ARGUMENTS)]))),
])))])  # fmt: skip


def map_call(value) -> pa.Table:
    call = {"function": {"name": "add", "arguments": [("a", value)]}}
    return pa.Table.from_pylist([calls(call)], CALLS)


def map_by_bytes() -> pa.Table:
    column = pa.array([[(b"k", 1)]], pa.map_(pa.binary(), pa.int32()))
    return pa.table({"question": ["q"], "answer": ["a"], "counts": column})


# kind → (name, bytes, (kept, rejected reasons) or a pattern of the error)
FILES = {
    "empty": ("a.jsonl", b"", (0, [])),
    "blank lines": ("a.jsonl", b"\n \n\t\n", (0, [])),
    "an empty array": ("a.json", b" [ ] ", (0, [])),
    "no final line end": ("a.jsonl", THREE, (3, [])),
    "cut short": ("a.jsonl", THREE[:-10], (2, ["not valid JSON"])),
    "CRLF": ("a.jsonl", THREE.replace(b"\n", b"\r\n"), (3, [])),
    "line ends of old Macs": ("a.jsonl", THREE.replace(b"\n", b"\r"), (0, ["not valid JSON"])),
    "a byte-order mark": ("a.jsonl", BOM + THREE, (3, [])),
    "a byte-order mark before an array": ("a.json", BOM + ARRAY, (3, [])),
    "an array under another name": ("a.jsonl", ARRAY, (3, [])),
    "lines under another name": ("a.json", THREE, (3, [])),
    "an array over many lines": ("a.json", json.dumps([says("the fox")], indent=2).encode(), (1, [])),
    "one object over many lines": ("a.json", json.dumps({"a": {}}, indent=2).encode(), (0, ["not valid JSON"] * 3)),
    "an array in an object": ("a.json", b'{"data": ' + ARRAY + b"}", (0, [NO_COLUMNS])),
    "an array of all sorts": (
        "a.json",
        b'[1, null, "x", [], {"a": NaN, "b": 1e999}]',
        (0, ["not a JSON object"] * 4 + [NO_COLUMNS]),
    ),
    "an array with a lone surrogate": ("a.json", b'[{"question": "q", "answer": "\\ud800"}]', (0, [SURROGATE])),
    "an array with a big number": (
        "a.json",
        b'[{"question": "q", "answer": "a", "id": 1180591620717411303424}]',
        (1, []),
    ),
    "an array nested too deeply": ("a.json", b'[{"a": ' + nested(150).encode() + b"}]", (0, ["not valid JSON"])),
    "an array nested without end": ("a.json", b"[" * 1_000_000, "nested too deeply"),
    "an array cut short": ("a.json", ARRAY[:-9], "element 3: "),
    "an array with Python's quotes": ("a.json", b"[{'a': 1}]", "element 1: "),
    "an array without commas": ("a.json", b'[{"a": 1} {"a": 2}]', "element 1: no comma after it"),
    "an array with a comma too many": ("a.json", b'[{"a": 1}, ]', "element 2: Expecting value"),
    "text after the array": ("a.json", ARRAY + b" x", "text after the array's end"),
    "an array that is not UTF-8": ("a.json", b'[{"a": "\xff"}]', "UnicodeDecodeError"),
    "gzip": ("a.jsonl.gz", gzip.compress(THREE), (3, [])),
    "gzip, nothing in it": ("a.jsonl.gz", gzip.compress(b""), (0, [])),
    "gzip, cut short": ("a.jsonl.gz", gzip.compress(THREE)[:-9], "cannot be read"),
    "gzip by name alone": ("a.jsonl.gz", THREE, "incorrect header check"),
    "gzip in disguise": ("a.jsonl", gzip.compress(THREE), r"it is gzip: let its name end in \.gz"),
    "gzip twice": ("a.jsonl.gz", gzip.compress(gzip.compress(THREE)), "it is gzip"),
    "zstd": ("a.jsonl.zst", ZSTD(THREE), (3, [])),
    "zstd, cut short": ("a.jsonl.zst", ZSTD(THREE)[:-9], "cannot be read"),
    "zstd by name alone": ("a.jsonl.zst", THREE, "Unknown frame descriptor"),
    "zstd in disguise": ("a.json", ZSTD(THREE), "it is zstd"),
    "UTF-16": ("a.jsonl", THREE.decode().encode("utf-16"), "it is UTF-16: save it as UTF-8"),
    "Parquet": ("a.parquet", parquet(TABLE), (3, [])),
    "Parquet without rows": ("a.parquet", parquet(pa.table({"question": pa.array([], pa.string())})), (0, [])),
    "Parquet, empty": ("a.parquet", b"", "file size is 0 bytes"),
    "Parquet, cut short": ("a.parquet", parquet(TABLE)[:-9], "Parquet magic bytes not found"),
    "Parquet by name alone": ("a.parquet", THREE, "Parquet magic bytes not found"),
    "Parquet in disguise": ("a.jsonl", parquet(TABLE), "it is Parquet"),
    "Parquet without known columns": ("a.parquet", parquet([{"text": "x"}]), (0, [NO_COLUMNS])),
    "Parquet with a column of nulls": (
        "a.parquet",
        parquet(pa.table({"question": ["q"], "answer": pa.nulls(1)})),
        (0, [NO_COLUMNS]),
    ),
    "Parquet with bytes for text": (
        "a.parquet",
        parquet([{"question": "q", "answer": b"a"}]),
        (0, ["content is not text"]),
    ),
    "Parquet with text that is not UTF-8": (
        "a.parquet",
        parquet(pa.table({"question": ["q", "q"], "answer": broken_utf8()})),
        (1, ["not UTF-8"]),
    ),
    "Parquet with two columns of one name": (
        "a.parquet",
        parquet(pa.table([["q"], ["a"], ["b"]], ["question", "answer", "answer"])),
        (1, []),
    ),
    "Parquet with a call's arguments as a map": ("a.parquet", parquet(map_call("1")), (1, [])),
    "the same with a marker": ("a.parquet", parquet(map_call(END)), (0, [MARKER])),
    "Parquet with a map that JSON has not": ("a.parquet", parquet(map_by_bytes()), (0, ["a value cannot be read"])),
    "Parquet with ids beyond 63 bits": (
        "a.parquet",
        parquet(pa.table({"question": ["q"], "answer": ["a"], "id": pa.array([2**64 - 1], pa.uint64())})),
        (1, []),  # as text: hashes have such ids
    ),
    "a name that is no data's": ("a.csv", b"question,answer\n", "unknown kind of file; known are"),
    "no suffix": ("rows", THREE, "unknown kind of file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file(tmp_path, kind):
    name, content, outcome = FILES[kind]
    (tmp_path / name).write_bytes(content)
    encoder = ENCODERS["tools"]
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=rf"^[^\n]*{outcome}[^\n]*$") as caught:
            ingest(tmp_path, [str(tmp_path / name)], encoder)
        beginning, _, end = str(caught.value).partition(" cannot be read (")
        assert str(tmp_path / name) in beginning
        assert end.endswith("): mend or leave out the file") or "unknown kind" in outcome
        return
    kept, rejected = ingest(tmp_path, [str(tmp_path / name)], encoder)
    assert (len(kept), [r["reason"] for r in rejected]) == outcome


def test_files_of_several_schemas_in_one_folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_bytes(GOOD)
    (data / "b.json").write_text(json.dumps([{"question": "q", "answer": "a", "id": "x"}, {"text": "y"}]))
    (data / "c.parquet").write_bytes(parquet([{"instruction": "i", "output": "o", "id": 2.5}]))
    kept, rejected = ingest(tmp_path, [str(data)], ENCODERS[""])
    assert sorted(row["id"] for row in kept) == ['"x"', "1", "2.5"]  # JSON text until all types are known
    assert [r["reason"] for r in rejected] == [NO_COLUMNS]


def loop(folder):
    (folder / "a.jsonl").symlink_to(folder / "a.jsonl")


def broken_link(folder):
    (folder / "a.jsonl").symlink_to(folder / "nowhere")


def pipe(folder):
    os.mkfifo(folder / "a.jsonl")


@pytest.mark.parametrize("make", [loop, broken_link, pipe])
@pytest.mark.parametrize("path", ["", "a.jsonl", "*.jsonl"])
def test_a_name_that_leads_to_no_file(tmp_path, make, path):
    """None is passed over, and a pipe is not waited for."""
    make(tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl is a broken link, a pipe or the like: mend or leave it out$"):
        list_files([os.path.join(tmp_path, path)])


def test_a_folder_that_leads_back_to_itself_doubles_no_row(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "again").symlink_to(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(THREE)
    kept, _ = ingest(tmp_path, [str(tmp_path)], ENCODERS[""])
    assert len(kept) == 3


@contextmanager
def as_nobody():
    """Root may read everything, so a test that is run by it steps down."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_is_named_not_passed_over(what):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.jsonl").write_bytes(THREE)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.jsonl").write_bytes(THREE)
        closed = folder / ("a.jsonl" if what == "file" else "sub")
        closed.chmod(0)
        with as_nobody(), pytest.raises(UserError, match=f"Permission denied.*{closed}"):
            [plan_file(url, label, PART_BYTES, "e") for url, label in list_files([name])]
        closed.chmod(0o755)
