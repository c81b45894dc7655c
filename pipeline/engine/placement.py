"""Puts a principle, and system messages that a template would not write, where the prompt holds them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import RowError
from pipeline.hub.chat_templates import PrincipleIn, PromptTemplate, SystemMessages
from pipeline.records import Message


def place(messages: Sequence[Message], principle: str | None, template: PromptTemplate) -> list[Message]:
    """The messages that the template is given.

    A principle is appended to the system message, or stands before the first user message. A system message that the
    template refuses or leaves out stands before both, in the first user message.

    Raises:
        RowError: there is no user message to hold them.
    """
    placed = list(messages)
    if principle is not None and template.principle_in is PrincipleIn.SYSTEM:
        placed = _in_system_message(placed, principle)
    elif principle is not None and template.principle_in is PrincipleIn.USER:
        placed = _in_user_message(placed, principle)
    if template.system is not SystemMessages.WRITTEN and placed and placed[0]["role"] == "system":
        system, *rest = placed
        placed = _in_user_message(rest, system["content"])
    return placed


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
