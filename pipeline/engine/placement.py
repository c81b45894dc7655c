"""Puts a principle, and system messages that a template would not write, where the prompt holds them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from pipeline.errors import RowError
from pipeline.hub.chat_templates import PrincipleIn, PromptTemplate, SystemMessages
from pipeline.records import Message


def place(messages: Sequence[Message], principle: str | None, template: PromptTemplate) -> list[Message]:
    """The messages that the template is given.

    A principle is appended to the system message, or stands before the first user message. A system message that the
    template refuses or leaves out stands before both, in the first user message. What a developer says is a system
    message where the template does not know this role.

    Raises:
        RowError: there is no user message to hold them.
    """
    placed = _without_developer(messages, template)
    if principle is not None and template.principle_in is PrincipleIn.SYSTEM:
        placed = _in_system_message(placed, principle)
    elif principle is not None and template.principle_in is PrincipleIn.USER:
        placed = _in_user_message(placed, principle)
    if template.system is not SystemMessages.WRITTEN and placed and placed[0]["role"] == "system":
        system, *rest = placed
        placed = _in_user_message(rest, system["content"])
    return placed


def _without_developer(messages: Sequence[Message], template: PromptTemplate) -> list[Message]:
    """The messages with a developer's as system messages, and those that come first as a single one."""
    if "developer" in (template.text or "") or all(message["role"] != "developer" for message in messages):
        return list(messages)
    known = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    first = list(takewhile(lambda message: message["role"] == "system", known))
    if not first:
        return known
    text = "\n\n".join(message["content"] for message in first)
    return [{"role": "system", "content": text}, *known[len(first) :]]


def _in_system_message(messages: list[Message], principle: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        system = {"role": "system", "content": f"{messages[0]['content']}\n\n{principle}"}
        return [system, *messages[1:]]
    return [{"role": "system", "content": principle}, *messages]


def _in_user_message(messages: list[Message], text: str) -> list[Message]:
    """Put a text before the first user message, as a paragraph of its own."""
    at = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        raise RowError(
            "the chat template has no place for a system message, and there is no user message to put it in"
        )
    message = {**messages[at], "content": f"{text}\n\n{messages[at]['content']}"}
    return [*messages[:at], message, *messages[at + 1 :]]
