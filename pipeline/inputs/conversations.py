"""Conversations as data sets write them become messages of role and content.

A conversation is a list of messages, that list as JSON text, or a transcript of HH-RLHF. A message has the keys role
and content (OpenAI) or from and value (ShareGPT).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.errors import RowError
from pipeline.inputs.tool_use import parse_calls, read_calls
from pipeline.quoting import quote
from pipeline.records import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
OLD_ROLES = {"function": "tool"}  # how OpenAI named the answer to a call before
ROLE_BY_SPEAKER = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "claude": "assistant",
    "instruction": "user",
    "function_call": "assistant",  # the value is the call, as JSON text
    "function-call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "tool_response": "tool",
}
CALLING_SPEAKERS = ("function_call", "function-call", "tool_call")
# A part of a message that a model would have to see; other keys are the data set's own notes and are dropped.
UNSUPPORTED_KEYS = ("audio",)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of vLLM and DeepSeek, OpenRouter, gpt-oss
ANSWER_KEYS = ("tool_call_id", "name")
TEXT_PARTS = ("text", "input_text", "output_text")
TURN = re.compile(r"\n\n(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def read_conversation(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a conversation; `where` is its place in the record, for messages of errors.

    Raises:
        RowError: it is not a conversation, or holds something that is not text.
    """
    if value is None:
        raise RowError(f"{where} is null")
    if isinstance(value, str):
        value = _parse(value, where)
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of messages; got {quote(value)}")
    if not value:
        raise RowError(f"{where} is empty")
    return tuple(_read_message(message, f"{where}[{index}]") for index, message in enumerate(value))


def as_json_messages(text: str) -> list[Any] | None:
    """The messages in a text that is the JSON of a conversation and nothing else; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_conversation = isinstance(value, list) and value and all(map(_looks_like_message, value))
    return value if is_conversation else None


def _looks_like_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return (isinstance(value.get("role"), str) and "content" in value) or (
        isinstance(value.get("from"), str) and "value" in value
    )


def count_names(value: Any) -> int:
    """How many messages of a conversation have the name of a speaker, which is dropped."""
    return sum(
        isinstance(message, dict) and bool(message.get("name")) and message.get("role") not in ("tool", *OLD_ROLES)
        for message in _listed(value)
    )


def count_reasoning(value: Any) -> int:
    """How many messages of a conversation have reasoning in a field of its own, which is not read."""
    return sum(
        isinstance(message, dict) and any(message.get(key) for key in REASONING_KEYS) for message in _listed(value)
    )


def check_text(text: Any, where: str) -> str:
    """The text itself. Raises RowError where it is not one that can be written."""
    if not isinstance(text, str):
        raise RowError(f"{where} must be text; got {quote(text)}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"{where} has a lone surrogate at character {error.start}") from None
    return text


def split_helpsteer(text: str) -> list[Message]:
    """The turns of a HelpSteer prompt; one user message where it has a single turn."""
    first, *rest = HELPSTEER_TURN.split(text)
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": "user", "content": first}, *({"role": who.lower(), "content": said} for who, said in turns)]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and any(f'"{key}"' in value for key in ("name", *REASONING_KEYS)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def _parse(text: str, where: str) -> Any:
    """A list of messages from JSON text or a transcript."""
    if TURN.match(text):
        return list(_transcript(text))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise RowError(
            f"{where} must be a list of messages, that list as JSON text, or a transcript of Human: and Assistant:; "
            f"got {quote(text)}"
        )
    return value


def _transcript(text: str) -> Iterator[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."; a last turn without text is where the answer goes."""
    _, *turns = TURN.split(text)
    for at in range(0, len(turns), 2):
        said = turns[at + 1].strip()
        if said or at + 2 < len(turns) or turns[at] == "Human":
            yield {"role": "user" if turns[at] == "Human" else "assistant", "content": said}


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{where} must be an object with role and content; got {quote(message)}")
    if message.get("role") is None and message.get("from") is not None:
        speaker = message["from"]
        role = ROLE_BY_SPEAKER.get(speaker.lower()) if isinstance(speaker, str) else None
        content, place = message.get("value"), f"{where}.value"
        if isinstance(speaker, str) and speaker.lower() in CALLING_SPEAKERS:
            message, content = {"tool_calls": parse_calls(content, place)}, None
        if role is None:
            raise RowError(f"{where}.from must be one of {', '.join(ROLE_BY_SPEAKER)}; got {quote(speaker)}")
    else:
        role, content, place = message.get("role"), message.get("content"), f"{where}.content"
        role = OLD_ROLES.get(role, role) if isinstance(role, str) else role
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"{where}.role must be one of {', '.join(ROLES)}; got {quote(role)}")
    for key in UNSUPPORTED_KEYS:
        if message.get(key):
            raise RowError(f"{where} has {key}, which is not supported; only role and content are used")
    calls = read_calls(message, where)
    if calls and role != "assistant":
        raise RowError(f"{where} has tool calls, and its role is {role}; only the assistant calls tools")
    read: Message = {"role": role, "content": "" if content is None and calls else _read_content(content, place)}
    if calls:
        read["tool_calls"] = calls
    if role == "tool":  # which call it answers
        read |= {key: check_text(message[key], f"{where}.{key}") for key in ANSWER_KEYS if message.get(key)}
    return read


def _read_content(content: Any, where: str) -> str:
    """The text of a message; the texts of its parts are joined as they are."""
    if not isinstance(content, list):
        return check_text(content, where)
    return "".join(_read_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _read_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return check_text(part, where)
    if not isinstance(part, dict):
        raise RowError(f"{where} must be a part with type and text; got {quote(part)}")
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in TEXT_PARTS:
        raise RowError(f"{where} is a part of type {quote(kind)}; only parts of text are read")
    return check_text(part.get("text"), f"{where}.text")
