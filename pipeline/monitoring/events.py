"""What a command says while it runs: lines for people, or events for machines, one JSON object a line.

An event has a time, a level, its name and fields. By default it holds nothing that a prompt or an answer may have
said: reasons of failed rows are cut to their kind, and what stands in quotation marks is left out of messages.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TextIO

from pipeline.monitoring.reasons import kind_of

# No apostrophe; up to the end of the line where the closing mark was cut off with the rest of a long value.
QUOTED = re.compile(r"(?<!\w)(?:(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")(?!\w)|['\"].*)")
EXAMPLES = re.compile(r"\n  .*")  # indented lines of a message are of single rows


class LogFormat(StrEnum):
    """How a command says what it does."""

    TEXT = "text"
    JSON = "json"


class Level(StrEnum):
    """How much an event matters."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to say about the answers so far.

    Args:
        text: for people; it may show values of a row.
        event: its name as an event.
        fields: of the event, without anything that a prompt may have said.
    """

    text: str
    event: str = "notice"
    fields: Mapping[str, Any] = field(default_factory=dict)


class EventLog(io.TextIOBase):
    """A text stream that writes events; a line that is printed to it becomes a `message`.

    Args:
        out: where the events are written, each in one piece.
        keeps_values: whether messages keep what stands in quotation marks.
    """

    def __init__(self, out: TextIO, *, keeps_values: bool = False) -> None:
        self._out = out
        self.keeps_values = keeps_values
        self._begun = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Write a `message` for each line that ends with this text."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self.message(line)
        return len(text)

    def message(self, text: str, level: Level = Level.INFO) -> None:
        """Write a line for people as an event; one that begins with "warning: " is a warning."""
        if text.startswith("warning: "):
            text, level = text.removeprefix("warning: "), Level.WARNING
        self.event("message", level=level, text=self.shown(text.strip()))

    def event(self, name: str, *, level: Level = Level.INFO, **fields: Any) -> None:
        """Write an event. Fields that are None are left out."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        given = {key: value for key, value in fields.items() if value is not None}
        line = json.dumps({"time": moment, "level": level, "event": name, **given}, ensure_ascii=False, default=str)
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()

    def notice(self, notice: Notice) -> None:
        """Write a notice: its fields, and with `keeps_values` its text."""
        self.event(
            notice.event,
            level=Level.WARNING,
            **notice.fields,
            text=self.shown(notice.text) if self.keeps_values or not notice.fields else None,
        )

    def shown(self, text: str) -> str:
        """A message as an event may have it."""
        return text if self.keeps_values else without_values(text)


def without_values(text: str) -> str:
    """A message without what stands in quotation marks and without its lines about single rows."""
    return QUOTED.sub("…", EXAMPLES.sub("", text))


def reason_without_values(reason: str) -> str:
    """The kind of a failed row's reason up to its first colon: behind it libraries and templates may quote rows."""
    return kind_of(without_values(reason)).partition(": ")[0]


def events_of(out: TextIO) -> EventLog | None:
    """The log that takes events, where a stream is one."""
    return out if isinstance(out, EventLog) else None
