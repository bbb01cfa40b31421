"""Tools and their calls, in the words of published datasets, as templates get them."""

import json

import pytest
from test_formats import ANSWER, CALL, ROWS, SYSTEM, USER, messages_of

from tokenclean_ray.formats import to_messages


@pytest.mark.parametrize(
    ("turn", "content", "calls"),
    [
        ({"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}, "", [CALL]),  # LLaMA-Factory
        ({"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 1}"}]'}, "", [CALL]),
        ({"from": "function_call", "value": "add(1)"}, "add(1)", []),
        ({"from": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}, "", [CALL]),  # ms-swift
        ({"role": "tool call", "content": CALL}, "", [CALL]),
        ({"from": "tool_call", "value": '{"name": "add", "parameters": {"a": 1}}'}, "", [CALL]),  # Llama 3's words
        ({"from": "gpt", "value": '{"name": "add"}'}, '{"name": "add"}', []),
        ({"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}, "", [CALL]),
        ({"role": "assistant", "content": "A", "tool_calls": [], "function_call": None}, "A", []),
    ],
)
def test_calls_in_other_words(turn, content, calls):
    found = messages_of({"messages": [USER, turn]})[1]
    expected = [{"type": "function", "function": call} for call in calls]
    assert found == {"role": "assistant", "content": content} | ({"tool_calls": expected} if calls else {})


def test_tool_calls_need_no_content():
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "2"},
        ]
    }
    assert messages_of(row)[1:] == [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "2"},
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ([], None),
        ("[]", None),
        ([{"name": "f"}], [{"type": "function", "function": {"name": "f"}}]),  # xLAM, LLaMA-Factory
        ('[{"name": "f"}]', [{"type": "function", "function": {"name": "f"}}]),
        ([{"type": "function", "name": "f"}], [{"type": "function", "function": {"name": "f"}}]),
        ([{"type": "function", "function": {"name": "f"}}], [{"type": "function", "function": {"name": "f"}}]),
        (['{"name": "f"}'], [{"type": "function", "function": {"name": "f"}}]),  # When2Call
        ([{"type": "web_search", "name": "f"}], [{"type": "web_search", "name": "f"}]),
    ],
)
def test_tools_column(value, expected):
    assert to_messages({**ROWS["messages"], "tools": value}, "auto", {})[1] == expected


@pytest.mark.parametrize("call", [CALL, {"type": "function", **CALL}, {"type": "function", "function": CALL}])
@pytest.mark.parametrize("id", [{}, {"id": "x"}])
def test_calls_are_as_templates_get_them(call, id):
    messages = messages_of({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call | id]}]})
    assert messages[1]["tool_calls"] == [{"type": "function", "function": CALL, **id}]


def test_functions_are_tools_in_older_words():
    """OpenAI's, beside function_call."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {**ROWS["messages"], "functions": [{"name": "f", "description": None}]}
    assert to_messages(row, "auto", {})[1] == tools
    assert to_messages(row | {"tools": None}, "auto", {})[1] == tools
    assert to_messages(row | {"functions": json.dumps(row["functions"])}, "auto", {})[1] == tools
    assert to_messages(row | {"tools": "[]"}, "auto", {})[1] is None
    assert to_messages(row, "auto", {"tools": "none"})[1] is None
    assert to_messages(row | {"functions": "def f(): pass"}, "auto", {})[1] is None
    assert to_messages(row | {"functions": ["f"]}, "auto", {})[1] is None


@pytest.mark.parametrize("answer", [json.dumps([CALL]), [CALL], "A"])
def test_answers_beside_tools_may_be_calls(answer):
    """As xLAM has them."""
    row = {"question": "Q", "answer": answer, "tools": json.dumps([{"name": "add"}])}
    turn = messages_of(row)[1]
    assert turn == (
        ANSWER if answer == "A" else messages_of({"messages": [USER, {"role": "tool_call", "content": answer}]})[1]
    )
    assert ("tool_calls" in turn) == (answer != "A")
    for none in ({}, {"tools": "[]"}):
        assert "tool_calls" not in messages_of(ROWS["question_answer"] | {"answer": json.dumps([CALL])} | none)[1]


HERMES = {
    "conversations": [
        {"from": "system", "value": "Call add. <tools>\n[{'function': {'name': 'add'}}]\n</tools>"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2 \n</tool_response>\n"},
        {"from": "gpt", "value": "A"},
    ],
    "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
}


def test_tools_that_the_system_lists_are_not_given_again():
    assert to_messages(HERMES, "auto", {})[1] is None
    other = HERMES | {"tools": json.dumps([{"type": "function", "function": {"name": "sub"}}])}
    assert to_messages(other, "auto", {})[1] is not None
    # what is told of a tool, or of another one, is no list of it
    for told in ("Call add.", "Tools are within <tools></tools> tags. Call add.", "<tools>['add_all']</tools>"):
        plain = {"messages": [SYSTEM | {"content": told}, USER, ANSWER], "tools": HERMES["tools"]}
        assert to_messages(plain, "auto", {})[1] is not None


def test_results_that_are_wrapped_are_turns_of_their_own():
    """Qwen's templates wrap them by themselves, and a marker in content rejects a row."""
    assert [turn["content"] for turn in messages_of(HERMES)[3:]] == ["1", "2", "A"]
    said = "<tool_response>1</tool_response>"
    for turn in (
        {"role": "tool", "content": f"so {said}"},
        {"role": "tool", "content": f"{said} so"},
        USER | {"content": said},
    ):
        assert messages_of({"messages": [USER, turn, ANSWER]})[1] == turn


def test_absent_arguments_of_other_tools_are_none():
    """Parquet gives each call the fields of all."""
    calls = [{"type": "function", "id": None, "function": {"name": "add", "arguments": {"a": 1, "b": [{"c": None}]}}}]
    calls[0]["function"]["arguments"]["city"] = None
    tools = [{"function": {"name": "add", "parameters": {"a": {"type": "int", "enum": None}}}}]
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": tools}
    messages, given, _ = to_messages(row, "auto", {})
    assert messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [{}]}}}
    ]
    assert given == [{"function": {"name": "add", "parameters": {"a": {"type": "int"}}}}]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [(None, {}), ('{"a": null}', {"a": None}), ("[1]", "[1]"), ("{", "{"), ("", {}), ({"a": "{}"}, {"a": "{}"})],
)
def test_arguments_as_json_text_are_objects(written, arguments):
    for call in ({"function": {"name": "f", "arguments": written}}, {"name": "f", "arguments": written}):
        row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        (found,) = to_messages(row, "auto", {})[0][1]["tool_calls"]
        assert found.get("function", found) == {"name": "f", "arguments": arguments}
