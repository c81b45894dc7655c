"""One input record becomes one `Row`. Whatever is wrong with it is reported in the row, never raised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RowError
from pipeline.records import Message, Row
from pipeline.storage.quoting import quote

ROLES = ("system", "user", "assistant", "tool")
# Parts of a message that a model would have to see; other keys are the data set's own notes and are dropped.
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id", "name", "audio")


@dataclass(frozen=True, slots=True)
class InputColumns:
    """The names of the input columns that are read; None for what is not read.

    Args:
        prompt: one text, which becomes a user message. Exactly one of `prompt` and `messages` is set.
        messages: a conversation.
        id: the row id; None names rows by file and position.
        weights: weights by principal, which replace the configured ones for the row.
        response: an answer to compare with.
    """

    prompt: str | None = None
    messages: str | None = None
    id: str | None = None
    weights: str | None = None
    response: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every column to read, each once."""
        all_names = (self.prompt, self.messages, self.id, self.weights, self.response)
        return tuple(dict.fromkeys(name for name in all_names if name is not None))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value that could not be decoded, and why."""

    reason: str


def make_row(
    record: Mapping[str, Any], columns: InputColumns, *, row_id: str, place: str, principal_names: Sequence[str]
) -> Row:
    """Build a row from a record's values by column name; `place` names it in an error ("line 17 of x.jsonl").

    A prompt column gives one user message. A fault gives a row with `error` and without messages.
    """
    try:
        return Row(
            row_id=row_id,
            messages=_read_messages(record, columns),
            weights=_read_weights(_value(record, columns.weights), principal_names),
            response=_read_response(_value(record, columns.response)),
        )
    except RowError as fault:
        return Row(row_id=row_id, error=f"{place}: {fault}")


def read_id(value: Any) -> str | None:
    """The text of an id: a string or a whole number; None for anything else, blank text included."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    try:
        text = str(value)
        text.encode("utf-8")
    except ValueError:  # a lone surrogate, or more digits than Python prints
        return None
    return text if text.strip() else None


def _value(record: Mapping[str, Any], column: str | None) -> Any:
    if column is None:
        return None
    value = record.get(column)
    if isinstance(value, Unreadable):
        raise RowError(f"{column} {value.reason}")
    return value


def _read_messages(record: Mapping[str, Any], columns: InputColumns) -> tuple[Message, ...]:
    column = columns.messages or columns.prompt
    assert column is not None
    if column not in record:
        raise RowError(f"there is no {column}")
    value = _value(record, column)
    if columns.messages is not None:
        return _check_messages(value, column)
    if value is None:
        raise RowError(f"{column} is null")
    if not isinstance(value, str):
        raise RowError(f"{column} must be text; got {quote(value)}")
    if not value.strip():
        raise RowError(f"{column} is empty")
    return ({"role": "user", "content": _check_text(value, column)},)


def _check_messages(value: Any, column: str) -> tuple[Message, ...]:
    if value is None:
        raise RowError(f"{column} is null")
    if not isinstance(value, list):
        raise RowError(f"{column} must be a list of messages; got {quote(value)}")
    if not value:
        raise RowError(f"{column} is empty")
    messages = tuple(_check_message(message, f"{column}[{index}]") for index, message in enumerate(value))
    if messages[-1]["role"] == "assistant":
        raise RowError(f"the last of {column} is the assistant's; it must be the message to answer")
    if not messages[-1]["content"].strip():
        raise RowError(f"the last of {column} is empty")
    return messages


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{where} must be an object with role and content; got {quote(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{where}.role must be one of {', '.join(ROLES)}; got {quote(role)}")
    if not isinstance(content, str):
        raise RowError(f"{where}.content must be text; got {quote(content)}")
    for key in UNSUPPORTED_KEYS:
        if message.get(key):
            raise RowError(f"{where} has {key}, which is not supported; only role and content are used")
    return {"role": role, "content": _check_text(content, f"{where}.content")}


def _check_text(text: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(f"{where} has a lone surrogate at character {error.start}") from None
    return text


def _read_weights(value: Any, principal_names: Sequence[str]) -> dict[str, float] | None:
    """Weights by principal; one that is null, and every one left out, keeps the configured weight."""
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # an Arrow map
    if not isinstance(value, dict):
        raise RowError(f"weights must be an object {{principal: number}}; got {quote(value)}")
    weights: dict[str, float] = {}
    for name, weight in value.items():
        if weight is None:
            continue
        if name not in principal_names:
            known = ", ".join(principal_names) or "none"
            raise RowError(f"weights name the unknown principal {quote(name)}; principals: {known}")
        weights[name] = _check_weight(weight, name)
    return weights or None


def _check_weight(weight: Any, name: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise RowError(f"the weight of {name} must be a number; got {quote(weight)}")
    try:
        number = float(weight)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise RowError(f"the weight of {name} must be finite and not negative; got {quote(weight)}")
    return number


def _read_response(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(f"response must be text; got {quote(value)}")
    return _check_text(value, "response")
