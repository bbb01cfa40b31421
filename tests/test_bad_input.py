"""Bad and strange rows, kind by kind: kept, or rejected for a reason.

`test_bad_files`, `test_bad_config` and `test_bad_models` are the other tables. Each case goes the real way, from the
file to the run folder, and whatever comes, input rows = encoded + rejected.
"""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer
from templates import IM, QWEN3

from tokenclean_ray.chat_template import build_encoder
from tokenclean_ray.config import Data
from tokenclean_ray.input_files import list_files
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
    "a turn that is text": ({"messages": ["the fox", ANSWER]}, "a turn is not an object"),
    "a question alone": ({"messages": ["the fox"]}, "no assistant turn"),
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
