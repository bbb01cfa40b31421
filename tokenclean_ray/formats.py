"""One input row → chat messages, whatever format the dataset came in.

Output: a list of {"role", "content", …} with the roles system, user, assistant and tool, content as text,
and the row's tool definitions. An answer that is not to be trained on has "weight": 0, as OpenAI writes it. What cannot
be understood raises `RowError`, with a reason that can be counted.
"""

import contextlib
from typing import Any

from tokenclean_ray.json_text import parse_json, without_nulls
from tokenclean_ray.schema import RowError
from tokenclean_ray.tool_calls import calls_in, calls_of, tools_of

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
    given = row.get("chat_template_kwargs") or {}  # as TRL has it
    if not isinstance(given, dict):
        raise RowError("chat_template_kwargs is not an object", type(given).__name__)
    return messages, tools_of(row, columns), without_nulls(given)


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
    turn = without_nulls(turn)
    sender, role = turn.pop("from", None), turn.pop("role", None)
    name = sender or role
    content = turn.pop("value", None) if "content" not in turn else turn.pop("content")
    if not isinstance(name, str):
        raise RowError("a turn has no role", where)
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise RowError("unknown role", f"{name!r} in {where}")
    calls = calls_of(turn, where)
    if not calls and name.strip().lower() == "function_call" and isinstance(content, str):
        calls = calls_in(content)
        content = "" if calls else content
    if calls:  # none, as [], is another thing to some templates than no such key
        turn["tool_calls"] = calls
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
