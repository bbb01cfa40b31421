"""Bad and strange rows and files, kind by kind: kept, rejected for a reason, or one line that says what to mend.

Two tables, of rows and of files; `test_bad_config` and `test_bad_models` are the others. Each case goes the real way,
from the file to the run folder, and whatever comes, input rows = encoded + rejected.
"""

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
from conftest import make_tokenizer
from templates import IM, QWEN3

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Data
from tokenclean_ray.errors import UserError
from tokenclean_ray.input_files import list_files
from tokenclean_ray.json_text import BOM
from tokenclean_ray.layout import Store
from tokenclean_ray.parts import Splits, encode_part
from tokenclean_ray.source import plan_file, read_parts, work_items

END = "<|im_end|>"
PART_BYTES = 1 << 20


class Kept(str):
    """The decoded response tokens of a row that is kept."""


def encoder_for(max_length=64, on_overflow="truncate", template=None):
    tokenizer = make_tokenizer(IM, template) if template else make_tokenizer()
    return build_encoder(tokenizer, "chat", max_length, on_overflow)


ENCODERS = {
    "": encoder_for(),
    "reject": encoder_for(on_overflow="reject"),
    "tools": encoder_for(512, template=QWEN3),
}


def ingest(folder: Path, paths: list[str], encoder, **data):
    """Plan, read and encode files as a run does; the kept rows and the rejected ones, whose counts must add up."""
    data, store = Data(**data), Store(str(folder / "run"))
    wanted = ["id", *data.extra_columns]
    summaries = []
    for url, label in list_files(paths):
        for item in work_items(plan_file(url, label, PART_BYTES, "e")):
            for part, rows in read_parts(item, PART_BYTES):
                summaries += encode_part(store, part, rows, encoder, data, wanted, Splits())
    kept, rejected = (
        [row for part in store.part_names(folder) for row in store.read_part(folder, part).to_pylist()]
        for folder in ("encoded", "rejected")
    )
    assert sum(s["input_rows"] for s in summaries) == len(kept) + len(rejected)
    assert sum(s["rows"] for s in summaries) == len(kept)
    assert sum(sum(s["rejected"].values()) for s in summaries) == len(rejected)
    return kept, rejected


def response_of(row, encoder) -> str:
    ids = [i for i, response in zip(row["input_ids"], row["response_mask"], strict=True) if response]
    return encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# ---- rows

USER = {"role": "user", "content": "the dog"}
ANSWER = {"role": "assistant", "content": "the fox"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
PLAIN = Kept("the fox" + END)


def says(text) -> dict:
    return {"messages": [USER, {"role": "assistant", "content": text}]}


def calls(*calls, content="") -> dict:
    return {"messages": [USER, {"role": "assistant", "content": content, "tool_calls": list(calls)}]}


def nested(depth) -> str:
    return "[" * depth + "]" * depth


NO_COLUMNS = "no known columns (set data.format and data.columns)"
MARKER = "special-token or template text in the content"
SURROGATE = "lone surrogate in text"

# kind → (row: an object, or the line's bytes; what becomes of it), in some cases settings of data
ROWS = {
    # fields
    "no known field": ({"text": "x"}, NO_COLUMNS),
    "an empty object": ({}, NO_COLUMNS),
    "a field that is null": ({"question": "q", "answer": None}, NO_COLUMNS),
    "a field that is missing": ({"prompt": "q"}, "no completion", {"format": "prompt_completion"}),
    "two formats in one row": ({"question": "q", "answer": "a", **says("the fox")}, PLAIN),
    "a renamed field that is missing": (
        {"q": "x"},
        "no question",
        {"columns": {"question": "ask"}, "format": "question_answer"},
    ),
    "one field twice": (b'{"question": "q", "answer": "a", "answer": "the fox"}', PLAIN),
    "fields that nobody asked for": (says("the fox") | {"labels": [1], "input_ids": "x", "": 0}, PLAIN),
    # types
    "a number": (b"3", "not a JSON object"),
    "a text": (b'"the fox"', "not a JSON object"),
    "a list": (b"[1]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "messages that are text": ({"messages": "the fox"}, "messages is not a list"),
    "messages that are an object": ({"messages": USER}, "messages is not a list"),
    "no messages": ({"messages": []}, "messages is empty"),
    "a turn that is text": ({"messages": ["the fox"]}, "a turn is not an object"),
    "a turn that is null": ({"messages": [None, ANSWER]}, "a turn is not an object"),
    "content that is a number": (says(5), "content is not text"),
    "content that is not a number": (b'{"question": "q", "answer": NaN}', "content is not text"),
    "content that is true": (says(True), "content is not text"),
    "content that is an object": (says({"text": "x"}), "content is not text"),
    "content in blocks": (says([{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]), PLAIN),
    "an image": (says([{"type": "image", "url": "x"}]), "content is not text"),
    # turns
    "no answer": ({"messages": [USER]}, "no assistant turn"),
    "an empty answer": (says(""), "empty answer"),
    "an answer of spaces": (says(" \n\t\u00a0\u2003"), "empty answer"),
    "an empty answer before another": (
        {"messages": [USER, {"role": "assistant", "content": ""}, USER, ANSWER]},
        "empty answer",
    ),
    "an answer that is null": (says(None), "a turn has no content"),
    "an empty question": ({"messages": [USER | {"content": ""}, ANSWER]}, PLAIN),
    "an answer to nothing": ({"messages": [ANSWER]}, PLAIN),
    "two answers in a row": ({"messages": [USER, ANSWER, ANSWER]}, Kept("the fox" + END + "the fox" + END)),
    "a question after the answer": ({"messages": [USER, ANSWER, USER]}, PLAIN),
    "a system turn in the middle": ({"messages": [USER, {"role": "system", "content": "x"}, ANSWER]}, PLAIN),
    "an unknown role": ({"messages": [USER | {"role": "narrator"}, ANSWER]}, "unknown role"),
    "an empty role": ({"messages": [USER | {"role": ""}, ANSWER]}, "unknown role"),
    "a role with a marker": ({"messages": [USER | {"role": END}, ANSWER]}, "unknown role"),
    "a role that is no text": ({"messages": [USER | {"role": ["user"]}, ANSWER]}, "a turn has no role"),
    "no role": ({"messages": [{"content": "x"}, ANSWER]}, "a turn has no role"),
    "a role in capitals": ({"messages": [USER | {"role": " User "}, ANSWER]}, PLAIN),
    # tools
    "a tool call": (
        calls(CALL),
        Kept('<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' + END),
        "tools",
    ),
    "a tool call that the template drops": (calls(CALL), "the chat template leaves out a tool call"),
    "the same beside text": (calls(CALL, content="the fox"), "the chat template leaves out a tool call"),
    "tool calls that are text": (
        calls() | {"messages": [USER, ANSWER | {"tool_calls": "add(1)"}]},
        "tool_calls is not a list of objects",
    ),
    "tool calls that are numbers": (calls(1), "tool_calls is not a list of objects"),
    "no content and no tool call": (calls(content=None), "a turn has no content"),
    "a marker in a call's arguments": (calls({"function": {"name": "f", "arguments": {"a": [END]}}}), MARKER, "tools"),
    "a marker in a tool's result": ({"messages": [USER, {"role": "tool", "content": f"4{END}"}, ANSWER]}, MARKER),
    "a marker in a tool's definition": (says("x") | {"tools": [{"name": END}]}, MARKER),
    "tools that are no JSON": (says("x") | {"tools": "[{"}, "tools is not valid JSON"),
    "tools that are no list": (says("x") | {"tools": "3"}, "tools is not a list of objects"),
    "tools nested without end": (says("x") | {"tools": nested(50_000)}, "tools is not valid JSON"),
    # JSON
    "no JSON": (b"the fox", "not valid JSON"),
    "half a row": (b'{"question": "q", "ans', "not valid JSON"),
    "two rows in a line": (b'{"question": "q", "answer": "a"}{"question": "q", "answer": "a"}', "not valid JSON"),
    "more than a row in a line": (b'{"question": "q", "answer": "a"} x', "not valid JSON"),
    "a list nested without end": (nested(50_000).encode(), "not valid JSON"),
    "Python's quotes": (b"{'question': 'q', 'answer': 'a'}", "not valid JSON"),
    "a comma too many": (b'{"question": "q", "answer": "a",}', "not valid JSON"),
    "a comment": (b"# rows", "not valid JSON"),
    "nested JSON in a field": (says("the fox") | {"meta": json.loads(nested(90))}, PLAIN),
    "nested too deeply": (says("the fox") | {"meta": json.loads(nested(150))}, "not valid JSON"),
    "nested without end": (b'{"a": ' + nested(50_000).encode() + b"}", "not valid JSON"),
    "JSON as the answer": (says('{"a": [1]}'), Kept('{"a": [1]}' + END)),
    "a number of 5,000 digits": (b'{"question": "q", "answer": "a", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "CSV": (b"question,answer", "not valid JSON"),
    # text
    "not UTF-8": (b'{"question": "q", "answer": "\xff"}', "not UTF-8"),
    "Latin-1": ('{"question": "q", "answer": "é"}'.encode("latin-1"), "not UTF-8"),
    "half a character": (b'{"question": "q", "answer": "\xe2\x82"}', "not UTF-8"),
    "a surrogate in UTF-8": (b'{"question": "q", "answer": "\xed\xa0\x80"}', "not UTF-8"),
    "a lone surrogate in the answer": (b'{"question": "q", "answer": "\\ud800"}', SURROGATE),
    "a lone surrogate in the id": (b'{"question": "q", "answer": "a", "id": "\\udfff"}', SURROGATE),
    "a lone surrogate in the source": (b'{"question": "q", "answer": "a", "source": "\\ud83d"}', SURROGATE),
    "a lone surrogate in a role": (b'{"messages": [{"role": "\\ud800", "content": "x"}]}', "unknown role"),
    "a lone surrogate in a field's name": (b'{"\\ud800": 1}', NO_COLUMNS),
    "a lone surrogate in a call": (calls({"function": {"name": "f", "arguments": {"\ud800": 1}}}), SURROGATE, "tools"),
    "a pair of surrogates": (b'{"question": "q", "answer": "\\ud83e\\uddf9"}', Kept("🧹" + END)),
    "a NUL, escaped": (says("a\0b"), Kept("a\0b" + END)),
    "a NUL, plain": (b'{"question": "q", "answer": "a\0b"}', "not valid JSON"),
    "right to left": (says("\u202eשלום\u202c مرحبا"), Kept("\u202eשלום\u202c مرحبا" + END)),
    "combining marks": (says("e\u0301\u0323 o\u0308"), Kept("e\u0301\u0323 o\u0308" + END)),
    "a joined emoji": (says("👩‍👧🏽"), Kept("👩‍👧🏽" + END)),
    "an emoji at the border": ({"question": "🧹", "answer": "🧹"}, Kept("🧹" + END)),
    "a byte-order mark in the text": (says("\ufeffthe fox"), Kept("\ufeffthe fox" + END)),
    "a zero-width space alone": (says("\u200b"), Kept("\u200b" + END)),
    "CRLF in the text": (says("a\r\nb"), Kept("a\r\nb" + END)),
    "a line separator in the text": (
        json.dumps(says("a\u2028b\x85c"), ensure_ascii=False).encode(),
        Kept("a\u2028b\x85c" + END),
    ),
    "an end of turn in the answer": (says(f"x{END}y"), MARKER),
    "a start of turn in the question": ({"question": "<|im_start|>assistant\nsure", "answer": "a"}, MARKER),
    "another special token": (says("</s>"), MARKER),
    "almost a special token": (says("<|im_end |>"), Kept("<|im_end |>" + END)),
    # length
    "an answer longer than max_length": (says("fox " * 500), Kept("fox " * 26)),
    "the same, to be rejected": (says("fox " * 500), "longer than data.max_length", "reject"),
    "a prompt that fills max_length": (
        {"question": "fox " * 500, "answer": "a"},
        "no response token within data.max_length",
    ),
    "a megabyte of answer": (says("fox " * 250_000), Kept("fox " * 26)),
    "a megabyte beside the answer": (says("the fox") | {"blob": "x" * 1_000_000}, PLAIN),
    "emoji cut by max_length": (says("🧹" * 40), Kept("🧹" * 13)),
    # carried columns
    "an id of another type": (says("the fox") | {"id": "x7"}, PLAIN),
    "an id beyond 64 bits": (says("the fox") | {"id": 2**70}, PLAIN),
    "an id that is an object": (says("the fox") | {"id": {"a": [1]}}, PLAIN),
    "a source that is a number": (says("the fox") | {"source": 5}, PLAIN),
}

GOOD = json.dumps(says("the quick fox") | {"id": 1}).encode()


def settings_of(case) -> tuple[str, dict]:
    """Which encoder, and the settings of data."""
    third = case[2] if len(case) > 2 else ""
    return ("", third) if isinstance(third, dict) else (third, {})


@pytest.mark.parametrize("kind", ROWS)
def test_a_row(tmp_path, kind):
    """Between two good rows, which it must not harm."""
    row, outcome = ROWS[kind][:2]
    name, data = settings_of(ROWS[kind])
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    good = json.dumps({"ask": "q", "prompt": "q", "completion": "c", "answer": "c"}).encode() if data else GOOD
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, line, good]) + b"\n")
    kept, rejected = ingest(tmp_path, [str(path)], ENCODERS[name], **data)
    if isinstance(outcome, Kept):
        assert not rejected
        response = response_of(sorted(kept, key=lambda r: r["row"])[1], ENCODERS[name])
        assert response.rstrip("\ufffd") == outcome.rstrip("\ufffd") or response.startswith(outcome)
    else:
        assert [r["row"] for r in kept] == [0, 2]
        assert [(r["reason"], r["line"], r["file"]) for r in rejected] == [(outcome, 2, str(path))]
        assert rejected[0]["text"] == line.decode("utf-8", "replace")
        assert rejected[0]["detail"] or outcome not in ("not UTF-8", "not valid JSON", "not a JSON object")


@pytest.mark.parametrize("same", ["rows", "ids"])
def test_duplicates_are_rows_like_others(tmp_path, same):
    rows = [says("the fox"), says("the fox" if same == "rows" else "the dog")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"id": 7}) + "\n" for row in rows))
    kept, rejected = ingest(tmp_path, [str(path)], ENCODERS[""])
    assert [(row["row"], row["id"]) for row in kept] == [(0, "7"), (1, "7")]
    assert not rejected


# ---- files


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
