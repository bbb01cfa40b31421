"""One input row → chat messages, whatever format the dataset came in.

Output: a list of {"role", "content", …} with the roles system, user, assistant and tool, content as text,
and the row's tool definitions. What cannot be understood raises `RowError`, with a reason that can be counted.
"""

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

Message = dict[str, Any]


def to_messages(row: dict[str, Any], format: str, columns: dict[str, str]) -> tuple[list[Message], list[Any] | None]:
    """The row's conversation and its tool definitions.

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
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("no assistant turn")
    return messages, _tools(row.get("tools"))


def _turns(row: dict[str, Any], format: str) -> list[Any]:
    match format:
        case "messages" | "sharegpt":
            turns = _list(row[REQUIRED[format][0]], REQUIRED[format][0])
            system = row.get("system") if format == "sharegpt" else None
            return ([{"role": "system", "content": system}] if system else []) + turns
        case "prompt_completion":
            prompt, completion = (
                [{"role": role, "content": row[column]}] if isinstance(row[column], str) else _list(row[column], column)
                for role, column in (("user", "prompt"), ("assistant", "completion"))
            )
            return prompt + completion
        case "alpaca":
            question = "\n\n".join(_text(row[c], c) for c in ("instruction", "input") if row.get(c))
            answer = row["output"]
        case _:
            question, answer = row["question"], row["answer"]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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
    calls = turn.get("tool_calls")
    if calls:
        _objects(calls, "tool_calls")
        turn["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    if content is None and not calls:
        raise RowError("a turn has no content", where)
    text = _text(content, where) if content is not None else ""
    if role == "assistant" and not text.strip() and not calls:
        raise RowError("empty answer", where)
    return {"role": role, "content": text, **turn}


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
            arguments = parse_json(arguments)
        except ValueError:
            return call
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):  # blocks, as multi-modal datasets write them
        if not all(isinstance(b, dict) and isinstance(b.get("text"), str) for b in content):
            raise RowError("content is not text", where)
        content = "".join(block["text"] for block in content)
    if not isinstance(content, str):
        raise RowError("content is not text", f"{type(content).__name__} in {where}")
    return content


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError("tools is not valid JSON", str(error)) from error
    if not value:
        return None
    _objects(value, "tools")
    return _without_nulls(value)


def _objects(value: Any, name: str) -> None:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{name} is not a list of objects", type(value).__name__)
