"""Tools and their calls: in whatever words rows have them → as templates get them when a model is served."""

import copy
import re
from collections.abc import Iterator
from typing import Any

from tokenclean_ray.json_text import as_json, parse_json, parsed, without_nulls
from tokenclean_ray.schema import RowError

Tool = dict[str, Any]
"""The definition of one, or a call of it."""


def tools_of(row: dict[str, Any], columns: dict[str, str]) -> list[Tool] | None:
    """A row's tools, from its column `tools`, or from OpenAI's older `functions`; None where there are none.

    Raises:
        RowError: they are not valid JSON, or not a list of objects.
    """
    older = parsed(row.get("functions")) if "tools" not in columns else None
    value = older if row.get("tools") is None and _named(older) else row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RowError("tools is not valid JSON", str(error)) from error
    if not value:
        return None
    if isinstance(value, list):
        value = [parsed(tool) for tool in value]  # When2Call
    _objects(value, "tools")
    return [_function(tool) for tool in without_nulls(value)]


def calls_of(turn: dict[str, Any], where: str) -> list[Tool]:
    """The calls that a turn makes, taken out of it: `tool_calls`, or one in `function_call`, as OpenAI wrote it before
    there were several.

    Raises:
        RowError: they are something else.
    """
    calls, older = turn.pop("tool_calls", None), turn.pop("function_call", None)
    if not calls and older:
        if not _named([older]):
            raise RowError("function_call is not an object with a name", where)
        calls = [older]
    if not calls:
        return []
    _objects(calls, "tool_calls")
    return [_as_served(call) for call in calls]


def are_listed(tools: list[Tool], text: str) -> bool:
    """Whether a system's turn lists the tools by itself, as Hermes has them twice."""
    listed = " ".join(re.findall("<tools>(.*?)</tools>", text, re.DOTALL))
    return all(re.search(rf"\b{re.escape(str(_inside(tool).get('name')))}\b", listed) for tool in tools)


def calls_in(content: Any) -> list[Tool]:
    """The calls that a turn from: function_call holds, mostly as JSON (LLaMA-Factory's); none in other text."""
    value = parsed(content)
    calls = value if isinstance(value, list) else [value]
    return [_as_served(call) for call in calls] if _named(calls) else []


def functions_called(messages: list[dict[str, Any]]) -> Iterator[Tool]:
    """The functions that the answers call, with their arguments."""
    for message in messages:
        for call in message.get("tool_calls") or () if message["role"] == "assistant" else ():
            yield _inside(call)


def with_written_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls as JSON text."""
    written = copy.deepcopy(messages)
    for call in functions_called(written):
        if isinstance(call.get("arguments"), dict):
            call["arguments"] = as_json(call["arguments"])
    return written


def _inside(tool: Tool) -> Tool:
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def _named(value: Any) -> bool:
    """Whether a value is a list of functions, or of calls of them."""
    return isinstance(value, list) and all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in value)


def _as_served(call: Tool) -> Tool:
    return _function(_with_parsed_arguments(call))


def _with_parsed_arguments(call: Tool) -> Tool:
    """A tool call with arguments as an object, as templates want them, where they are JSON text, as OpenAI has them,
    parameters, as Llama 3 calls them, or none."""
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_parsed_arguments(call["function"])}
    if "arguments" not in call and "parameters" in call:
        call = {"arguments" if key == "parameters" else key: value for key, value in call.items()}
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parsed(arguments) if arguments.strip() else {}
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _function(tool: Tool) -> Tool:
    """A tool, or the call of one, as templates get it when a model is served; some datasets have its inside alone."""
    if "function" in tool or not isinstance(tool.get("name"), str) or tool.get("type", "function") != "function":
        return tool
    inside = {key: value for key, value in tool.items() if key not in ("type", "id")}
    return {"type": "function", "function": inside} | ({"id": tool["id"]} if "id" in tool else {})


def _objects(value: Any, name: str) -> None:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{name} is not a list of objects", type(value).__name__)
