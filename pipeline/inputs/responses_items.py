"""Requests of the Responses API (`/v1/responses`): their input as messages, their tools in the shape of chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import RowError
from pipeline.quoting import quote

# what a request refers to is kept by the service, so its conversation is not whole
ELSEWHERE = ("previous_response_id", "conversation", "prompt")
MESSAGE, CALL, RESULT, REASONING = "message", "function_call", "function_call_output", "reasoning"


def is_responses_request(record: Mapping[str, Any]) -> bool:
    """Whether a batch request is one of the Responses API, by its url or, without one, by its body."""
    body = record.get("body")
    if not isinstance(body, Mapping) or "messages" in body:
        return False
    url = record.get("url")
    if isinstance(url, str):
        return url.rstrip("/").endswith("/responses")
    return any(key in body for key in ("input", "instructions", "max_output_tokens", *ELSEWHERE[:2]))


def as_chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the chat request that asks for the same.

    Raises:
        RowError: it refers to what only the service has, or holds an item that is no message and no call.
    """
    for key in ELSEWHERE:
        if body.get(key) is not None:
            raise RowError(f"body.{key} refers to what the service keeps, so its conversation cannot be read")
    chat = {key: value for key, value in body.items() if key not in ("input", "instructions", "tools")}
    messages = list(_messages(body.get("input")))
    instructions = body.get("instructions")
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    chat["messages"] = messages
    if body.get("tools"):
        chat["tools"] = _tools(body["tools"])
    if (limit := chat.pop("max_output_tokens", None)) is not None:
        chat["max_completion_tokens"] = limit
    reasoning = chat.get("reasoning")
    if isinstance(reasoning, Mapping) and reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
        rest = {key: value for key, value in reasoning.items() if key != "effort" and value is not None}
        chat["reasoning"] = rest or None
    return chat


def _messages(value: Any) -> list[dict[str, Any]]:
    if value is None:
        raise RowError("body.input is null")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise RowError(f"body.input must be text or a list of items; got {quote(value)}")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(value):
        _add(messages, item, f"body.input[{index}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Append what an item says. Calls in succession are one message, as in chat."""
    if not isinstance(item, Mapping):
        raise RowError(f"{where} must be an object; got {quote(item)}")
    kind = item.get("type", MESSAGE)
    if kind == MESSAGE:
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == CALL:
        call = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == RESULT:
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != REASONING:  # of earlier turns, which templates leave out as well
        raise RowError(f"{where} is an item of type {quote(kind)}; only messages and calls of functions are read")


def _tools(value: Any) -> Any:
    """Functions stand in an object of their own in chat; what is no function is left for `read_tools` to refuse."""
    if not isinstance(value, list):
        return value
    tools = []
    for index, tool in enumerate(value):
        if isinstance(tool, Mapping) and tool.get("type") not in (None, "function"):
            raise RowError(
                f"body.tools[{index}] is a tool of type {quote(tool['type'])}; only functions are passed on"
            )
        if isinstance(tool, Mapping) and "function" not in tool:
            rest = {key: each for key, each in tool.items() if key != "type"}
            tool = {"type": "function", "function": rest}
        tools.append(tool)
    return tools
