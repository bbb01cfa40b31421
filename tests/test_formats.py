"""Rows of every known format become messages; what cannot be understood is refused for a countable reason."""

import json

import pytest

from tokenclean_ray.formats import ROLES, to_messages
from tokenclean_ray.schema import RowError

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
CALL = {"name": "add", "arguments": {"a": 1}}
ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "prompt_completion": {"prompt": "Q", "completion": "A"},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "question_answer": {"question": "Q", "answer": "A"},
}


def messages_of(row, format="auto", columns=None):
    return to_messages(row, format, columns or {})[0]


def with_turn(**turn):
    return {"messages": [turn, ANSWER]}


@pytest.mark.parametrize("format", ROWS)
def test_every_format_named_or_found(format):
    assert messages_of(ROWS[format], format) == [USER, ANSWER]
    assert messages_of({"id": 7, **ROWS[format]}) == [USER, ANSWER]


def test_auto_ignores_columns_that_are_null():
    nulls = {"messages": None, "conversations": None, "prompt": "P", "completion": None}
    assert messages_of({**nulls, **ROWS["question_answer"]}) == [USER, ANSWER]


def test_auto_takes_the_first_format_that_fits():
    assert messages_of({**ROWS["question_answer"], "messages": [{**USER, "content": "first"}, ANSWER]}) == [
        {**USER, "content": "first"},
        ANSWER,
    ]


@pytest.mark.parametrize("format", ROWS)
def test_system_column(format):
    assert messages_of({"system": "S", **ROWS[format]}) == [SYSTEM, USER, ANSWER]
    assert messages_of({"system": "", **ROWS[format]}) == [USER, ANSWER]


def test_a_system_turn_that_is_there_stays_the_only_one():
    for row in (
        {"messages": [SYSTEM, USER, ANSWER]},
        {"conversations": [{"from": "System", "value": "S"}, USER, ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": "A"},
    ):
        assert messages_of(row | {"system": "other"}) == [SYSTEM, USER, ANSWER]


def test_answers_in_a_prompt_and_of_weight_0_are_not_trained_on():
    untrained = {**ANSWER, "weight": 0}
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert messages_of(row) == [USER, untrained, USER, ANSWER]
    turns = [{**USER, "weight": 1}, untrained, {**USER, "weight": 0}, {**ANSWER, "weight": 1}]
    assert messages_of({"messages": turns}) == [USER, untrained, USER, ANSWER]


def test_answers_without_a_loss_are_not_trained_on():
    """As AgentInstruct and ms-swift have them."""
    turns = [USER | {"loss": None}, ANSWER | {"loss": False}, USER, ANSWER | {"loss": True}]
    assert messages_of({"messages": turns}) == [USER, ANSWER | {"weight": 0}, USER, ANSWER]


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Translate.", "input": "bonjour", "output": "hello"}
    assert messages_of(row)[0]["content"] == "Translate.\n\nbonjour"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": "A"},
    ],
)
def test_conversational_prompt_and_completion(row):
    assert messages_of(row) == [SYSTEM, USER, ANSWER]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("system", "system"),
        ("developer", "system"),
        ("human", "user"),
        ("User", "user"),
        (" gpt ", "assistant"),
        ("chatgpt", "assistant"),
        ("model", "assistant"),
        ("function_call", "assistant"),
        ("function", "tool"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("Chatbot", "assistant"),
        ("ai", "assistant"),
        ("tool_call", "assistant"),
        ("function-call", "assistant"),
        ("tool_response", "tool"),
        ("function-response", "tool"),
        ("environment", "tool"),
    ],
)
def test_roles(name, role):
    for turn in (
        {"role": name, "content": "x"},
        {"from": name, "value": "x"},
        {"from": name, "role": "odd", "value": "x"},
    ):
        assert messages_of({"messages": [turn, ANSWER]})[0] == {"role": role, "content": "x"}


def test_roles_are_those_a_template_knows():
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}


def test_content_blocks_are_joined():
    blocks = [{"type": "text", "text": "a "}, {"type": "input_text", "text": "b"}]
    assert messages_of(with_turn(role="user", content=blocks))[0]["content"] == "a b"


def test_absent_fields_that_parquet_fills_with_null():
    turn = {"role": "user", "content": "Q", "from": None, "value": None, "tool_calls": None, "name": None}
    assert messages_of({"messages": [turn, ANSWER]}) == [USER, ANSWER]


def test_what_else_a_row_gives_the_template():
    """TRL's and SmolTalk 2's; Parquet fills what a row has not with null."""
    row = {**ROWS["messages"], "chat_template_kwargs": {"enable_thinking": False, "documents": None}}
    assert to_messages(row, "auto", {})[2] == {"enable_thinking": False}
    assert to_messages(row, "auto", {"chat_template_kwargs": "none"})[2] == {}
    assert to_messages(ROWS["messages"] | {"chat_template_kwargs": None}, "auto", {})[2] == {}
    with pytest.raises(RowError, match="chat_template_kwargs is not an object"):
        to_messages(row | {"chat_template_kwargs": "x"}, "auto", {})


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_turns_as_json_text(column):
    """SWE-smith's and Toucan's: Parquet cannot hold turns of several kinds."""
    turns = [USER, {"role": "assistant", "content": "A", "function_call": CALL}]
    assert messages_of({column: json.dumps(turns)}) == messages_of({column: turns})
    with pytest.raises(RowError, match="is not a list"):
        messages_of({column: json.dumps(USER)})


def test_columns_are_renamed():
    row = {"q": "Q", "a": "A", "question": "other"}
    columns = {"question": "q", "answer": "a"}
    assert messages_of(row, "question_answer", columns) == [USER, ANSWER]
    assert messages_of(row, "auto", columns) == [USER, ANSWER]
    assert messages_of({"chat": [USER, ANSWER]}, columns={"messages": "chat"}) == [USER, ANSWER]


@pytest.mark.parametrize(
    "turns",
    [
        ["Q", "A", "Q", "A"],  # LIMA, UltraChat
        {"from": ["human", "gpt"] * 2, "value": ["Q", "A"] * 2},  # a Sequence of datasets
        [{"input": "Q", "output": "A"}] * 2,  # Capybara
    ],
)
def test_turns_written_in_other_ways(turns):
    for value in (turns, json.dumps(turns)):
        assert messages_of({"conversations": value}) == [USER, ANSWER] * 2


@pytest.mark.parametrize("of_turn", [(None, None), (12, 5)])
def test_turns_with_roles_are_no_pairs(of_turn):
    """Parquet gives each turn the keys of all turns, and some count their tokens."""
    other = dict(zip(("input", "output"), of_turn, strict=True))
    assert [t["content"] for t in messages_of({"messages": [USER | other, ANSWER | other]})] == ["Q", "A"]


@pytest.mark.parametrize("format", ["alpaca", "question_answer"])
def test_the_turns_before_a_question(format):
    """As LLaMA-Factory and ms-swift have them."""
    earlier = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    for history in ([["Q1", "A1"]], '[["Q1", "A1"]]'):
        assert messages_of(ROWS[format] | {"history": history, "system": "S"}) == [SYSTEM, *earlier, USER, ANSWER]
    for none in ([], None, "[]", "1789 to 1815"):
        assert messages_of(ROWS[format] | {"history": none}) == [USER, ANSWER]
    other = ROWS[format] | {"history": ["asthma"]}
    with pytest.raises(RowError) as caught:
        messages_of(other)
    assert caught.value.detail == "data.columns: {history: none} does without"
    assert messages_of(other, columns={"history": "none"}) == [USER, ANSWER]


def test_keys_of_turns_are_renamed_or_taken_out():
    row = {"messages": [{"speaker": "human", "text": "Q"}, {"speaker": "gpt", "text": "A", "thinking": "T", "n": 1}]}
    keys = {"role": "speaker", "content": "text", "reasoning_content": "thinking", "n": None}
    expected = [USER, ANSWER | {"reasoning_content": "T"}]
    assert to_messages(row, "auto", {}, keys)[0] == expected
    asked = {"prompt": row["messages"], "completion": row["messages"][1:]}
    found = to_messages(asked, "auto", {}, keys | {"weight": None})[0]
    assert found == [USER, expected[1] | {"weight": 0}, expected[1]]
    with pytest.raises(RowError, match="a turn is not an object"):
        to_messages({"messages": [None, ANSWER]}, "auto", {}, keys)


def test_keys_are_those_of_the_input_s_own_turns():
    keys = {"role": "speaker", "content": "text", "input": "ask", "output": "reply"}
    for turns in (["Q", "A"], [{"ask": "Q", "reply": "A"}], {"speaker": ["human", "gpt"], "text": ["Q", "A"]}):
        assert to_messages({"conversations": turns}, "auto", {}, keys)[0] == [USER, ANSWER]
    swapped = [{"role": turn["content"], "content": turn["role"]} for turn in (USER, ANSWER)]
    assert to_messages({"messages": swapped}, "auto", {}, {"role": "content", "content": "role"})[0] == [USER, ANSWER]


def test_the_row_is_left_as_it_was():
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    messages_of(row)
    assert row == ROWS["sharegpt"]


@pytest.mark.parametrize(
    ("reason", "format", "row"),
    [
        ("no messages", "messages", {"messages": None}),
        ("no output", "alpaca", {"instruction": "Q"}),
        ("no answer", "question_answer", {"question": "Q", "answer": None}),
        ("prompt is empty", "auto", {"prompt": [], "completion": "A"}),
        ("completion is not a list", "auto", {"prompt": "Q", "completion": 5}),
        ("a turn has no content", "auto", with_turn(role="user", content=None)),
        ("content is not text", "auto", {"question": 5, "answer": "A"}),
        ("content is not text", "auto", {"instruction": 5, "output": "A"}),
        ("empty answer", "auto", {"messages": [USER, {"role": "assistant", "content": []}]}),
        ("no assistant turn that is trained on", "auto", {"messages": [USER, {**ANSWER, "weight": 0}]}),
        ("a turn's weight is neither 0 nor 1", "auto", {"messages": [USER, {**ANSWER, "weight": 0.5}]}),
        ("function_call is not an object with a name", "auto", {"messages": [USER, {**ANSWER, "function_call": "f"}]}),
        ("content is not text", "auto", {**ROWS["messages"], "images": ["a.png"]}),
        ("content is not text", "auto", with_turn(role="user", content=[{"type": "image", "text": ""}])),
        ("tools is not a list of objects", "auto", {**ROWS["messages"], "tools": '{"name": "f"}'}),
        ("tools is not a list of objects", "auto", {**ROWS["messages"], "tools": ["f"]}),
        ("content is not text", "auto", with_turn(role="user", content=[None])),
        ("conversations has lists of different lengths", "auto", {"conversations": {"from": ["human"], "value": []}}),
        ("conversations is empty", "auto", {"conversations": {"from": [], "value": []}}),
        ("history is not a list of pairs", "auto", {**ROWS["alpaca"], "history": ["Q", "A"]}),
        ("a thought is a turn of its own", "auto", {"messages": [USER, {**ANSWER, "channel": "analysis"}, ANSWER]}),
        ("the completion is a bad one", "auto", {**ROWS["prompt_completion"], "label": False}),
    ],
)  # fmt: skip
def test_refused(reason, format, row):
    """Many more: test_bad_input."""
    with pytest.raises(RowError) as caught:
        to_messages(row, format, {})
    assert caught.value.reason == reason


def test_refusals_say_where():
    with pytest.raises(RowError) as caught:
        messages_of({"messages": [USER, ANSWER, {"role": "narrator", "content": "x"}]})
    assert caught.value.detail == "'narrator' in turn 3"
    with pytest.raises(RowError) as caught:
        messages_of(with_turn(role="user", content=[{"type": "text", "text": "x"}, {"type": "image"}]))
    assert caught.value.detail == "a block of type image in turn 1"
    with pytest.raises(RowError) as caught:
        messages_of({"text": "x", "b": 1, "c": None})
    assert caught.value.detail == "columns: b, text"
