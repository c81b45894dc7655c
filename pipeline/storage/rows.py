"""One input record becomes one `Row`. Whatever is wrong with it is reported in the row, never raised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.errors import RowError
from pipeline.records import Message, Row
from pipeline.storage.batch_bodies import read_parameters
from pipeline.storage.quoting import quote

ROLES = ("system", "user", "assistant", "tool")
# Parts of a message that a model would have to see; other keys are the data set's own notes and are dropped.
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id", "name", "audio")

ID_ADVICE = "without input.id rows are named by file and position"


@dataclass(frozen=True, slots=True)
class InputColumns:
    """The names of the input columns that are read; None for what is not read.

    Args:
        prompt: one text, which becomes a user message. Exactly one of `prompt` and `messages` is set.
        messages: a conversation.
        id: the row id; None names rows by file and position.
        weights: weights by principal, which replace the configured ones for the row.
        response: an answer to compare with.
        body: an OpenAI batch request's body, for its parameters.
        repeated_ids: ids that more than one row has, over all files; these rows fail.
    """

    prompt: str | None = None
    messages: str | None = None
    id: str | None = None
    weights: str | None = None
    response: str | None = None
    body: str | None = None
    repeated_ids: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "repeated_ids", frozenset(self.repeated_ids))  # a stored plan has a list

    @property
    def names(self) -> tuple[str, ...]:
        """Every column to read, each once."""
        all_names = (self.prompt, self.messages, self.id, self.weights, self.response)
        return tuple(dict.fromkeys(name for name in all_names if name is not None))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value that could not be decoded, and why."""

    reason: str


class FoundId(NamedTuple):
    """The id of one row, before it is known whether others have it too.

    `row_id` is None where there is no usable one; then, and where it repeats, `position` names the row. `place` is
    how messages call the row. A broken row has no id column that could be at fault.
    """

    row_id: str | None
    position: str
    place: str
    is_broken: bool = False


def make_row(
    record: Mapping[str, Any], columns: InputColumns, *, row_id: str, place: str, principal_names: Sequence[str]
) -> Row:
    """Build a row from a record's values by column name.

    A prompt column gives one user message. A fault gives a row with `error` and without messages.

    Args:
        record: the values.
        columns: which of them are read.
        row_id: by position; of a row without a usable id, and of every row where no id column is read.
        place: names the row in an error ("line 17 of x.jsonl").
        principal_names: the names that weights may use.
    """
    try:
        own_id = row_id if columns.id is None else _own_id(record, columns)
    except RowError as fault:
        return Row(row_id=row_id, error=f"{place}: {fault}")
    try:
        parameters = read_parameters(_value(record, columns.body) or {})
        return Row(
            row_id=own_id,
            messages=_read_messages(record, columns),
            weights=_read_weights(_value(record, columns.weights), principal_names),
            response=_read_response(_value(record, columns.response)),
            max_new_tokens=parameters.max_new_tokens,
            seed=parameters.seed,
            stop=parameters.stop,
            not_obeyed=parameters.not_obeyed,
        )
    except RowError as fault:
        return Row(row_id=own_id, error=f"{place}: {fault}")


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


def _own_id(record: Mapping[str, Any], columns: InputColumns) -> str:
    column = columns.id
    assert column is not None
    value = record.get(column)
    row_id = read_id(value)
    if row_id is None:
        shown = value.reason if isinstance(value, Unreadable) else quote(value)
        raise RowError(f"{column} must be an id, text or a whole number; got {shown}; {ID_ADVICE}")
    if row_id in columns.repeated_ids:
        raise RowError(f"{column} {quote(row_id)} is the id of several rows; {ID_ADVICE}")
    return row_id


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
    """Weights by principal; every one that is left out keeps the configured weight."""
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # an Arrow map
    if not isinstance(value, dict):
        raise RowError(f"weights must be an object {{principal: number}}; got {quote(value)}")
    weights: dict[str, float] = {}
    for name, weight in value.items():
        if name not in principal_names:
            known = ", ".join(principal_names) or "none"
            raise RowError(f"weights name the unknown principal {quote(name)}; principals: {known}")
        weights[name] = _check_weight(weight, name)
    return weights or None


def _check_weight(weight: Any, name: str) -> float:
    if weight is None:  # a column of structs has no way to leave a field out: a map has
        raise RowError(f"the weight of {name} is null; give a number, or leave it out to keep the configured one")
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
