"""One input row → chat messages, whatever format the dataset came in.

Output: a list of {"role", "content", …} with the roles system, user, assistant and tool, content as text,
and the row's tool definitions. An answer that is not to be trained on has "weight": 0, as OpenAI writes it. What cannot
be understood raises `RowError`, with a reason that can be counted.
"""

import re
from typing import Any

from tokenclean_ray.json_text import parsed, without_nulls
from tokenclean_ray.schema import RowError
from tokenclean_ray.tool_calls import are_listed, calls_in, calls_of, tools_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "environment": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")  # roles whose content is calls, as JSON

# format → the columns that it needs; auto takes the first whose columns a row has
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
}

PAIR, SENDER = {"input", "output"}, {"role", "from"}  # keys of a pair of turns; of a turn, for who says it
TEXT_BLOCKS = (None, "text", "input_text", "output_text")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # columns beside the text, which refers to them

Message = dict[str, Any]
TurnKeys = dict[str, str | None]
"""Expected key of a turn → the input's own, or None for none."""
Conversation = tuple[list[Message], list[Any] | None, dict[str, Any]]
"""Messages, tool definitions, and what else the row gives the chat template."""


def to_messages(
    row: dict[str, Any], format: str, columns: dict[str, str], turn_keys: TurnKeys | None = None
) -> Conversation:
    """The row's conversation.

    Args:
        row: the input row.
        format: a key of `REQUIRED`, or auto.
        columns: expected column → the input's own.
        turn_keys: the same of the keys of turns.

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
    turns = enumerate(_turns(row, format, turn_keys or {}))
    messages = [message for number, turn in turns for message in _apart(_normalise(turn, number))]
    if row.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(row["system"], "column system")}, *messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    if not any(answer.get("weight", 1) for answer in answers):
        raise RowError("no assistant turn that is trained on", "each has weight 0 or is of the prompt")
    if row.get("label") is False and None not in (row.get("prompt"), row.get("completion")):  # TRL's rows for KTO
        raise RowError("the completion is a bad one", "label is false")
    for column in MEDIA:
        if row.get(column):
            raise RowError("content is not text", f"column {column}")
    given = row.get("chat_template_kwargs") or {}  # as TRL has it
    if not isinstance(given, dict):
        raise RowError("chat_template_kwargs is not an object", type(given).__name__)
    tools = tools_of(row, columns)
    if tools and messages[0]["role"] == "system" and are_listed(tools, messages[0]["content"]):
        tools = None
    return messages, tools, without_nulls(given)


def _turns(row: dict[str, Any], format: str, keys: TurnKeys) -> list[Any]:
    match format:
        case "messages" | "sharegpt":
            column = REQUIRED[format][0]
            return turns_in(row[column], column, keys)
        case "prompt_completion":
            prompt, completion = (
                [{"role": role, "content": row[column]}]
                if isinstance(row[column], str)
                else _renamed(_list(row[column], column), keys)
                for role, column in (("user", "prompt"), ("assistant", "completion"))
            )
            # answers in a prompt are examples: the completion alone is trained on, as by TRL
            return [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in prompt] + completion
        case "alpaca":
            question = "\n\n".join(_text(row[c], c) for c in ("instruction", "input") if row.get(c))
            answer = row["output"]
        case _:
            question, answer = row["question"], row["answer"]
    answering = "tool_call" if parsed(row.get("tools")) else "assistant"  # xLAM's answers are calls, as JSON
    return [*_earlier(row), {"role": "user", "content": question}, {"role": answering, "content": answer}]


def turns_in(value: Any, column: str, keys: TurnKeys) -> list[Any]:
    """The turns that a column holds, however they are written; `keys` as of `to_messages`."""
    value = parsed(value)  # JSON, as where Parquet would have to hold turns of several kinds
    if isinstance(value, dict) and all(isinstance(own, list) for own in value.values()):
        if len(set(map(len, value.values()))) > 1:  # a Sequence of datasets
            raise RowError(f"{column} has lists of different lengths")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    turns = _renamed(_list(value, column), keys)
    if all(isinstance(turn, str) for turn in turns):  # LIMA, UltraChat
        return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    if all(isinstance(turn, dict) and turn.keys() >= PAIR and not turn.keys() & SENDER for turn in turns):  # Capybara
        return _exchanges([(turn["input"], turn["output"]) for turn in turns])
    return turns


def _earlier(row: dict[str, Any]) -> list[Any]:
    """The turns before a row's question, as LLaMA-Factory and ms-swift have them."""
    history = parsed(row.get("history"))
    if not isinstance(history, list):
        return []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("history is not a list of pairs", "data.columns: {history: none} does without")
    return _exchanges(history)


def _exchanges(pairs: list[Any]) -> list[Any]:
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{column} is not a list", type(value).__name__)
    if not value:
        raise RowError(f"{column} is empty")
    return value


def _renamed(turns: list[Any], keys: TurnKeys) -> list[Any]:
    """Turns whose keys are those that are expected."""
    gone = {*keys, *keys.values()}
    return [
        {key: value for key, value in turn.items() if key not in gone}
        | {wanted: turn[own] for wanted, own in keys.items() if own in turn}
        if keys and isinstance(turn, dict)
        else turn
        for turn in turns
    ]


def _apart(message: Message) -> list[Message]:
    """A tool's results that Hermes has wrapped, each as a turn of its own: templates wrap them by themselves."""
    opening, closing = "<tool_response>", "</tool_response>"
    *results, rest = message["content"].strip().split(closing)
    if message["role"] != "tool" or rest or not all(result.lstrip().startswith(opening) for result in results):
        return [message]
    return [message | {"content": result.strip().removeprefix(opening).strip()} for result in results] or [message]


def as_role(name: str) -> str:
    """A role's name as `ROLES` has it."""
    return re.sub("[ -]", "_", name.strip().lower())


def _normalise(turn: Any, number: int) -> Message:
    where = f"turn {number + 1}"
    if not isinstance(turn, dict):
        raise RowError("a turn is not an object", where)
    turn = without_nulls(turn)
    sender, name = turn.pop("from", None), turn.pop("role", None)
    name = sender or name
    content = turn.pop("value", None) if "content" not in turn else turn.pop("content")
    if not isinstance(name, str):
        raise RowError("a turn has no role", where)
    role = ROLES.get(as_role(name))
    if role is None:
        raise RowError("unknown role", f"{name!r} in {where}")
    if role == "assistant" and turn.get("channel") == "analysis":  # gpt-oss's
        raise RowError("a thought is a turn of its own", f"{where}: make it the thinking of the answer that follows")
    calls = calls_of(turn, where)
    if not calls and as_role(name) in CALLING:
        calls = calls_in(content)
        content = "" if calls else content
    if calls:  # none, as [], is another thing to some templates than no such key
        turn["tool_calls"] = calls
    if content is None and not calls:
        raise RowError("a turn has no content", where)
    text = _text(content, where) if content is not None else ""
    if role == "assistant" and not text.strip() and not calls:
        raise RowError("empty answer", where)
    weight = turn.pop("weight", 1) if turn.pop("loss", True) else 0  # ms-swift's, AgentInstruct's
    if weight not in (0, 1):
        raise RowError("a turn's weight is neither 0 nor 1", f"{weight!r} in {where}")
    untrained = {"weight": 0} if role == "assistant" and not weight else {}
    return {"role": role, "content": text, **turn, **untrained}


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):  # blocks, as multi-modal datasets write them
        for block in content:
            if not _is_text(block):
                kind = block.get("type") if isinstance(block, dict) else type(block).__name__
                raise RowError("content is not text", f"a block of type {kind} in {where}")
        content = "".join(block["text"] for block in content)
    if not isinstance(content, str):
        raise RowError("content is not text", f"{type(content).__name__} in {where}")
    return content


def _is_text(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("text"), str) and block.get("type") in TEXT_BLOCKS
