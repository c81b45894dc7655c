"""Whether a chat template writes the tools of a conversation: many leave them out without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.errors import RowError
from pipeline.records import Message, Tool

Render = Callable[[Sequence[Message], Sequence[Tool]], str]


def check_tools_written(render: Render, messages: Sequence[Message], tools: Sequence[Tool], role: str) -> None:
    """Leave out tools, calls, and what tools answered in turn: a text that stays the same did not have them.

    Args:
        render: the chat template.
        messages: the conversation.
        tools: what may be called.
        role: of the model, for the message.

    Raises:
        RowError: the template left something of them out.
    """
    calls = [{key: each[key] for key in each if key != "tool_calls"} for each in messages]
    answers = [{**each, "content": ""} if each["role"] == "tool" and each["content"] else each for each in messages]
    without: list[tuple[str, Sequence[Message], Sequence[Tool]]] = [
        ("tools", messages, ()),
        ("tool calls", calls, tools),
        ("messages of the role tool", answers, tools),
    ]
    changed = [each for each in without if (list(each[1]), list(each[2])) != (list(messages), list(tools))]
    if not changed:
        return
    text = render(messages, tools)
    for what, other_messages, other_tools in changed:
        try:
            is_written = render(other_messages, other_tools) != text
        except RowError:  # it refuses the conversation without them, so it reads them
            is_written = True
        if not is_written:
            raise RowError(f"the chat template of {role} does not write {what}")
