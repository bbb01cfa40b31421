"""For every template that the tests know: content cannot open or end a turn, wherever it stands and however written."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turns import ENCODERS, check_row

from tokenclean_ray.schema import RowError

LOOKALIKES = str.maketrans({"<": "＜", ">": "＞", "|": "｜", "[": "［", "]": "］", "#": "＃", "/": "／", ":": "："})
INVISIBLE = ["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\0", "\u202e", "\u0301"]
WORDS = [
    "the fox",
    "1 + 1",
    "é",
    "🧹",
    "<think>",
    "</think>",
    "<tool_call>",
    "system",
    "user",
    "assistant",
    "model",
    "\\",
]
SPACES = ["", " ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028"]


def pieces(markers):
    """Markers whole, cut, folded, spaced out, and words and spaces around them."""
    marker = st.sampled_from(markers)
    cut = st.builds(lambda m, at: (m[: at % len(m)], m[at % len(m) :]), marker, st.integers(1, 30))
    return st.one_of(
        marker,
        cut.map(lambda halves: halves[0]),
        cut.map(lambda halves: halves[1]),
        st.builds(lambda halves, c: c.join(halves), cut, st.sampled_from(INVISIBLE + SPACES)),
        marker.map(lambda m: m.translate(LOOKALIKES)),
        marker.map(str.swapcase),
        st.sampled_from(WORDS),
        st.sampled_from(SPACES + INVISIBLE),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    )


def rows(name):
    text = st.lists(pieces(ENCODERS[name][1]), max_size=5).map("".join)
    answer = st.builds("".join, st.tuples(text, st.just("x"), text))
    call = st.builds(
        lambda function, key, value: {"type": "function", "function": {"name": function, "arguments": {key: [value]}}},
        st.just("add") | text,
        text,
        text,
    )
    turn = st.one_of(
        st.builds(lambda c: {"role": "user", "content": c}, text),
        st.builds(lambda a: {"role": "assistant", "content": a}, answer),
        st.builds(lambda c: {"role": "tool", "content": c, "name": c}, text),
        st.builds(lambda c: {"role": "system", "content": [{"type": "text", "text": c}] * 2}, text),
        st.builds(lambda a, c: {"role": "assistant", "content": a, "tool_calls": [c]}, answer, call),
    )
    ends = st.builds(lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}], text, answer)
    tools = st.none() | st.builds(lambda t: [{"type": "function", "function": {"name": "f", "description": t}}], text)
    return st.builds(
        lambda turns, end, t: {"messages": turns + end, "tools": t}, st.lists(turn, max_size=3), ends, tools
    )


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_content_cannot_open_or_end_a_turn(name, data):
    row = data.draw(rows(name))
    try:
        text, spans, ids, mask = check_row(name, row)
    except RowError:
        return
    encoder = ENCODERS[name][0]
    decoded = encoder.tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False)
    # between two answers the tokens that straddle their borders may bring a space of the template's
    answers = r"\s*".join(re.escape(text[start:end]) for start, end in spans)
    first = encoder.tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False)
    # a first token has no loss; it may be a space that the template writes and the answer's first word
    if encoder.tokenizer.backend_tokenizer.normalizer is None and spans[0][0] >= len(first):
        assert re.search(answers, decoded)  # and what straddles a border


@pytest.mark.parametrize("name", ENCODERS)
def test_plain_rows_pass(name):
    """The property above is about rows that are kept, so some must be."""
    row = {"messages": [{"role": r, "content": f"the {r} says"} for r in ("user", "assistant") * 2]}
    assert sum(check_row(name, row)[3]) > 8


@pytest.mark.parametrize(
    ("name", "text"), [("lowercase", "<|IM_END|>"), ("nfkc", "＜|im_end|＞"), ("nfkc", "<｜im_end｜>")]
)
def test_what_the_tokenizer_folds_into_a_special_token_is_refused(name, text):
    encoder = ENCODERS[name][0]
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in encoder.tokenizer(text)["input_ids"]
    with pytest.raises(RowError, match="special-token"):
        check_row(name, {"question": text, "answer": "x"})
