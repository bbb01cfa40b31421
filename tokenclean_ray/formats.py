"""One input row → chat messages, whatever format the dataset came in.

Output: a list of {"role", "content", …} with the roles system, user, assistant and tool, content as text,
and the row's tool definitions. An answer that is not to be trained on has "weight": 0, as OpenAI writes it. What cannot
be understood raises `RowError`, with a reason that can be counted.
"""

import contextlib
from typing import Any

from tokenclean_ray.json_text import parse_json
from tokenclean_ray.schema import RowError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# format → the columns that it needs; auto takes the first whose columns a row has
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
}

MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # columns beside the text, which refers to them

Message = dict[str, Any]


Conversation = tuple[list[Message], list[Any] | None, dict[str, Any]]
"""Messages, tool definitions, and what else the row gives the chat template."""


def to_messages(row: dict[str, Any], format: str, columns: dict[str, str]) -> Conversation:
    """The row's conversation.

    Args:
        row: the input row.
        format: a key of `REQUIRED`, or auto.
        columns: expected column → the input's own.

    Raises:
        RowError: missing or null columns, wrong types, unknown roles, no or an empty answer.
    """
    row = {**row, **{wanted: row.get(own) for wanted, own in columns.items()}}
    if format == "auto":
        format = next((f for f, need in REQUIRED.items() if all(row.get(c) is not None for c in need)), "")
        if not format:
            has = ", ".join(sorted(k for k, v in row.items() if v is not None)) or "none"
            raise RowError("no known columns (set data.format and data.columns)", f"columns: {has}")
    for column in REQUIRED[format]:
        if row.get(column) is None:
            raise RowError(f"no {column}", "the column is missing or null")
    messages = [_normalise(turn, number) for number, turn in enumerate(_turns(row, format))]
    if row.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(row["system"], "column system")}, *messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    if not any(answer.get("weight", 1) for answer in answers):
        raise RowError("no assistant turn that is trained on", "each has weight 0 or is of the prompt")
    for column in MEDIA:
        if row.get(column):
            raise RowError("content is not text", f"column {column}")
    older = row.get("functions") if "tools" not in columns else None
    tools = _tools(older if row.get("tools") is None and _named(older) else row.get("tools"))
    given = row.get("chat_template_kwargs") or {}  # as TRL has it
    if not isinstance(given, dict):
        raise RowError("chat_template_kwargs is not an object", type(given).__name__)
    return messages, tools, _without_nulls(given)


def _turns(row: dict[str, Any], format: str) -> list[Any]:
    match format:
        case "messages" | "sharegpt":
            column = REQUIRED[format][0]
            turns = row[column]
            if isinstance(turns, str):  # JSON, as where Parquet would have to hold turns of several kinds
                with contextlib.suppress(ValueError):
                    turns = parse_json(turns)
            return _list(turns, column)
        case "prompt_completion":
            prompt, completion = (
                [{"role": role, "content": row[column]}] if isinstance(row[column], str) else _list(row[column], column)
                for role, column in (("user", "prompt"), ("assistant", "completion"))
            )
            # answers in a prompt are examples: the completion alone is trained on, as by TRL
            return [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in prompt] + completion
        case "alpaca":
            question = "\n\n".join(_text(row[c], c) for c in ("instruction", "input") if row.get(c))
            answer = row["output"]
        case _:
            question, answer = row["question"], row["answer"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{column} is not a list", type(value).__name__)
    if not value:
        raise RowError(f"{column} is empty")
    return value


def _normalise(turn: Any, number: int) -> Message:
    where = f"turn {number + 1}"
    if not isinstance(turn, dict):
        raise RowError("a turn is not an object", where)
    turn = _without_nulls(turn)
    sender, role = turn.pop("from", None), turn.pop("role", None)
    name = sender or role
    content = turn.pop("value", None) if "content" not in turn else turn.pop("content")
    if not isinstance(name, str):
        raise RowError("a turn has no role", where)
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise RowError("unknown role", f"{name!r} in {where}")
    calls = turn.pop("tool_calls", None) or _old_call(turn.pop("function_call", None), where)
    if not calls and name.strip().lower() == "function_call" and isinstance(content, str):
        calls = _calls_in(content)
        content = "" if calls else content
    if calls:  # none, as [], is another thing to some templates than no such key
        _objects(calls, "tool_calls")
        turn["tool_calls"] = [_function(_with_parsed_arguments(call)) for call in calls]
    if content is None and not calls:
        raise RowError("a turn has no content", where)
    text = _text(content, where) if content is not None else ""
    if role == "assistant" and not text.strip() and not calls:
        raise RowError("empty answer", where)
    weight = turn.pop("weight", 1)
    if weight not in (0, 1):
        raise RowError("a turn's weight is neither 0 nor 1", f"{weight!r} in {where}")
    untrained = {"weight": 0} if role == "assistant" and not weight else {}
    return {"role": role, "content": text, **turn, **untrained}


def _old_call(call: Any, where: str) -> list[Any]:
    """A call as OpenAI wrote it before there were several."""
    if call and not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        raise RowError("function_call is not an object with a name", where)
    return [call] if call else []


def _calls_in(text: str) -> list[Any]:
    """The calls that a turn from: function_call holds as JSON, as LLaMA-Factory has them; none in other text."""
    try:
        value = parse_json(text)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    return calls if _named(calls) else []


def _named(value: Any) -> bool:
    """Whether a value is a list of functions, or of calls of them."""
    return isinstance(value, list) and all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in value)


def _without_nulls(value: Any) -> Any:
    """Parquet fills absent fields with null: each call of a tool would have the arguments of all tools."""
    match value:
        case dict():
            return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
        case list():
            return [_without_nulls(inner) for inner in value]
    return value


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with arguments as an object, as templates want them, where they are JSON text, as OpenAI has them, or
    none."""
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_parsed_arguments(call["function"])}
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError:
            return call
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):  # blocks, as multi-modal datasets write them
        if not all(map(_is_text, content)):
            raise RowError("content is not text", where)
        content = "".join(block["text"] for block in content)
    if not isinstance(content, str):
        raise RowError("content is not text", f"{type(content).__name__} in {where}")
    return content


def _is_text(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("text"), str) and block.get("type") in (None, "text")


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError("tools is not valid JSON", str(error)) from error
    if not value:
        return None
    _objects(value, "tools")
    return [_function(tool) for tool in _without_nulls(value)]


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool, or the call of one, as templates get it when a model is served; some datasets have its inside alone."""
    if "function" in tool or not isinstance(tool.get("name"), str) or tool.get("type", "function") != "function":
        return tool
    inside = {key: value for key, value in tool.items() if key not in ("type", "id")}
    return {"type": "function", "function": inside} | ({"id": tool["id"]} if "id" in tool else {})


def _objects(value: Any, name: str) -> None:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{name} is not a list of objects", type(value).__name__)
