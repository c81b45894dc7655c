"""Tools in conversations: what a model may call, and the calls that it made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.errors import RowError
from pipeline.quoting import quote
from pipeline.records import Message


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Definitions of tools: a list of {"type": "function", "function": {"name": ...}}, also as JSON text.

    Nulls are left out: a column of structs fills what a tool does not have with them.

    Raises:
        RowError: it is no such list.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{where} must be a list of tools; got {quote(value)}") from None
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of tools; got {quote(value)}")
    tools = tuple(_without_nulls(tool) for tool in value)
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or not tool_name(tool):
            raise RowError(f"{where}[{index}] must be a function with a name; got {quote(tool)}")
    _check_writable(tools, where)
    return tools


def read_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls of a message in OpenAI's shape; arguments that are JSON text of an object become the object.

    Raises:
        RowError: they have another shape.
    """
    calls = message.get("tool_calls") or []
    if not calls and message.get("function_call"):  # how OpenAI wrote a single call before
        calls = [{"function": message["function_call"]}]
    if not isinstance(calls, list):
        raise RowError(f"{where}.tool_calls must be a list; got {quote(calls)}")
    read = [_read_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    _check_writable(read, f"{where}.tool_calls")
    return read


def parse_calls(text: Any, where: str) -> list[Any]:
    """The calls that a speaker of ShareGPT's makes: {"name", "arguments"}, or a list of them, as JSON text.

    Raises:
        RowError: it is no such text.
    """
    value = text
    if isinstance(text, str):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise RowError(
            f"{where} must be the call of a function, {{name, arguments}}, as JSON text; got {quote(text)}"
        )
    return calls


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The name of a tool, or of the tool that a call calls."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name.strip() else None


def uses_tools(messages: Iterable[Message]) -> bool:
    """Whether a conversation has calls, or answers to calls that name them."""
    return any("tool_calls" in each or "tool_call_id" in each or "name" in each for each in messages)


def as_stored(message: Message) -> dict[str, Any]:
    """A message as output files hold it: the arguments of calls as JSON text, which has one type for all tools."""
    stored = dict(message)
    if "tool_calls" in message:
        stored["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return stored


def _read_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function", call), dict) or not tool_name(call):
        raise RowError(f"{where} must be the call of a function with a name; got {quote(call)}")
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    read: dict[str, Any] = {"type": "function", "function": {"name": tool_name(call), "arguments": arguments or {}}}
    return {"id": call["id"], **read} if isinstance(call.get("id"), str) else read


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _check_writable(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        raise RowError(f"{where} holds a value that JSON cannot hold, or a lone surrogate") from None


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
