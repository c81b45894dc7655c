"""One input record becomes one `Row`. Whatever is wrong with it is reported in the row, never raised."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Any, NamedTuple
from uuid import UUID

from pipeline.errors import RowError
from pipeline.inputs.answer_lists import read_candidates
from pipeline.inputs.batch_bodies import TEMPLATE_KWARGS, RequestParameters, read_parameters, read_template_kwargs
from pipeline.inputs.conversations import (
    as_json_messages,
    check_text,
    count_names,
    count_reasoning,
    read_conversation,
)
from pipeline.inputs.given import given_text, readable_weights
from pipeline.inputs.record_formats import FORMAT_BY_NAME
from pipeline.inputs.tool_use import read_tools, uses_tools
from pipeline.quoting import quote
from pipeline.records import Message, Row, Tool

TEXT_LIMIT = 8 * 2**20  # characters of a row's conversation and existing answer
TOOLS = "tools"  # the column that is read beside conversations where the configuration names none
ID_ADVICE = "without input.id rows are named by file and position"


class LastAssistant(StrEnum):
    """What the assistant's message at the end of a conversation is."""

    RESPONSE = "response"  # the existing answer
    PREFILL = "prefill"  # the beginning of the new answer
    ERROR = "error"
    UNEXPECTED = "unexpected"  # an error, because the run was planned without existing answers


@dataclass(frozen=True, slots=True)
class InputColumns:
    """How the rows of a file are read: the names of columns, None for what is not read, and what they mean.

    Args:
        prompt: one text, which becomes a user message, or a conversation. Exactly one of `prompt`, `messages` and
            `format` is set.
        messages: a conversation.
        format: the name of a recognised format, which has columns of its own.
        format_columns: those of them that the file has.
        id: the row id; None names rows by file and position.
        weights: weights by principal, which replace the configured ones for the row.
        response: an answer to compare with.
        tools: what the model may call.
        template_kwargs: what chat templates read besides the messages.
        candidates: answers that the row's game is about.
        has_tools: whether rows may have tools or calls of them.
        body: an OpenAI batch request's body, for its parameters.
        last_assistant: what the assistant's message at the end of a conversation is.
        has_response: whether rows may have an existing answer, wherever it comes from.
        repeated_ids: ids that more than one row has, over all files; these rows fail.
    """

    prompt: str | None = None
    messages: str | None = None
    id: str | None = None
    weights: str | None = None
    response: str | None = None
    body: str | None = None
    format: str | None = None
    format_columns: tuple[str, ...] = ()
    last_assistant: LastAssistant = LastAssistant.ERROR
    has_response: bool = False
    tools: str | None = None
    has_tools: bool = False
    repeated_ids: frozenset[str] = frozenset()
    template_kwargs: str | None = None
    candidates: str | None = None

    def __post_init__(self) -> None:
        """A stored plan has lists and strings."""
        object.__setattr__(self, "repeated_ids", frozenset(self.repeated_ids))
        object.__setattr__(self, "format_columns", tuple(self.format_columns))
        object.__setattr__(self, "last_assistant", LastAssistant(self.last_assistant))

    @property
    def names(self) -> tuple[str, ...]:
        """Every column to read, each once."""
        own = (self.prompt, self.messages, *self.format_columns, self.id, self.weights, self.response)
        all_names = (*own, self.tools, self.template_kwargs, self.candidates)
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

    A text as the prompt gives one user message. A fault gives a row with `error` and without messages.

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
        return _unreadable_row(record, columns, row_id, f"{place}: {fault}", principal_names)
    try:
        parameters = read_parameters(_value(record, columns.body) or {})
        messages, response = _read_conversation(record, columns)
        tools = _read_tools(record, columns, messages)
        _check_size(messages, response)
        return Row(
            row_id=own_id,
            messages=messages,
            weights=_read_weights(_value(record, columns.weights), principal_names),
            response=response,
            tools=tools,
            num_names=count_names(_value(record, columns.messages or columns.prompt)),
            num_reasoning=count_reasoning(_value(record, columns.messages or columns.prompt)),
            is_json_prompt=_is_json_prompt(record, columns),
            max_new_tokens=parameters.max_new_tokens,
            seed=parameters.seed,
            stop=parameters.stop,
            not_obeyed=parameters.not_obeyed,
            template_kwargs=_read_kwargs(record, columns, parameters),
            candidates=read_candidates(_value(record, columns.candidates), columns.candidates),
            wished_kwargs=parameters.wished_kwargs,
        )
    except RowError as fault:
        return _unreadable_row(record, columns, own_id, f"{place}: {fault}", principal_names)


def _unreadable_row(
    record: Mapping[str, Any], columns: InputColumns, row_id: str, error: str, principal_names: Sequence[str]
) -> Row:
    """A row with an error, and with what of it can be read all the same."""
    messages: tuple[Message, ...] = ()
    response: str | None = None
    try:
        messages, response = _read_conversation(record, columns)
    except RowError:
        with contextlib.suppress(RowError):
            messages = _read_messages(record, columns) if columns.format is None else ()
        with contextlib.suppress(RowError):
            response = _read_response(_value(record, columns.response), messages)
    try:
        _check_size(messages, response)
    except RowError:
        messages, response = (), None
    names = (*columns.names, *((columns.body,) if columns.body else ()))
    return Row(
        row_id=row_id,
        error=error,
        messages=messages,
        response=response if columns.has_response else None,
        weights=readable_weights(record.get(columns.weights or ""), principal_names),
        given=given_text({name: record[name] for name in names if name in record}),
    )


def read_id(value: Any) -> str | None:
    """The text of an id: a string, a whole number or a UUID; None for anything else, blank text included."""
    if isinstance(value, UUID):
        return str(value)
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


def _read_conversation(record: Mapping[str, Any], columns: InputColumns) -> tuple[tuple[Message, ...], str | None]:
    """The messages to answer, and the existing answer."""
    if columns.format is None:
        messages, response = _read_messages(record, columns), None
        where = columns.messages or columns.prompt or ""
    else:
        readable = {name: _value(record, name) for name in columns.format_columns if name in record}
        read, response = FORMAT_BY_NAME[columns.format].read(readable)
        messages, where = tuple(read), "the conversation"
    if columns.response is not None:
        response = _read_response(_value(record, columns.response), messages)
    if messages[-1]["role"] == "assistant":
        messages, response = _end_with_assistant(messages, response, where, columns.last_assistant)
    if not messages[-1]["content"].strip():
        raise RowError(f"the last of {where} is empty")
    return messages, response


def _read_tools(record: Mapping[str, Any], columns: InputColumns, messages: tuple[Message, ...]) -> tuple[Tool, ...]:
    body = _value(record, columns.body)
    column = columns.tools
    if column is None and (columns.messages is not None or columns.format is not None):
        column = TOOLS  # which the first lines of the file do not have
    tools = read_tools(_value(record, column), column or TOOLS)
    for key in ("tools", "functions"):  # the latter is how OpenAI named them before
        if body and body.get(key):
            tools = read_tools(body[key], f"body.{key}")
            break
    if not columns.has_tools and (tools or uses_tools(messages)):
        raise RowError(
            "there are tools or calls of tools, and none in the first rows, so the output has no columns for them; "
            "name a column of tools with input.tools"
        )
    return tools


def _is_json_prompt(record: Mapping[str, Any], columns: InputColumns) -> bool:
    value = None if columns.prompt is None else record.get(columns.prompt)
    return isinstance(value, str) and as_json_messages(value) is not None


def _read_kwargs(
    record: Mapping[str, Any], columns: InputColumns, parameters: RequestParameters
) -> Mapping[str, Any]:
    """What the row's templates read besides the messages: an object, also as JSON text; nulls are left out."""
    if columns.template_kwargs is None:
        if read_template_kwargs(_value(record, TEMPLATE_KWARGS), TEMPLATE_KWARGS):
            raise RowError(
                f"there is {TEMPLATE_KWARGS}, and none in the first rows of the file, so it was planned without; "
                f"name it with input.{TEMPLATE_KWARGS}"
            )
        return parameters.template_kwargs
    return read_template_kwargs(_value(record, columns.template_kwargs), columns.template_kwargs)


def _end_with_assistant(
    messages: tuple[Message, ...], response: str | None, where: str, meaning: LastAssistant
) -> tuple[tuple[Message, ...], str | None]:
    """Take the assistant's last message as what `meaning` says."""
    *before, last = messages
    if "tool_calls" in last:
        raise RowError(f"the last of {where} is a call of a tool; what the tool answered must follow")
    if meaning is LastAssistant.ERROR:
        raise RowError(f"the last of {where} is the assistant's; it must be the message to answer")
    if meaning is LastAssistant.UNEXPECTED:
        raise RowError(
            f"the last of {where} is the assistant's, and the first rows end with the message to answer; say with "
            "input.last_assistant what it is: response (the existing answer), prefill or error"
        )
    if not before or before[-1]["role"] == "assistant":
        raise RowError(f"before the assistant's last of {where} there is no message to answer")
    if meaning is LastAssistant.PREFILL:
        if response is not None:
            raise RowError(f"the last of {where} is the beginning of an answer, and there is an existing answer, too")
        return messages, None
    if response not in (None, last["content"]):
        raise RowError(f"the last of {where} is the assistant's, and there is another existing answer")
    return tuple(before), last["content"]


def _read_messages(record: Mapping[str, Any], columns: InputColumns) -> tuple[Message, ...]:
    column = columns.messages or columns.prompt
    assert column is not None
    if column not in record:
        raise RowError(f"there is no {column}")
    value = _value(record, column)
    if columns.messages is not None or isinstance(value, list):
        return read_conversation(value, column)
    if value is None:
        raise RowError(f"{column} is null")
    if not isinstance(value, str):
        raise RowError(f"{column} must be text or a list of messages; got {quote(value)}")
    if not value.strip():
        raise RowError(f"{column} is empty")
    if (messages := as_json_messages(value)) is not None:
        return read_conversation(messages, column)
    return ({"role": "user", "content": check_text(value, column)},)


def _check_size(messages: tuple[Message, ...], response: str | None) -> None:
    """Refuse what would take minutes to tokenize and fits no context, while the other rows wait."""
    size = sum(len(message["content"]) for message in messages) + len(response or "")
    if size > TEXT_LIMIT:
        raise RowError(f"the conversation has {size:,} characters; at most {TEXT_LIMIT:,} are read")


def _read_weights(value: Any, principal_names: Sequence[str]) -> dict[str, float] | None:
    """Weights by principal; every one that is left out keeps the configured weight."""
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # an Arrow map
    if isinstance(value, str):  # as CSV has it
        value = _parse_weights(value)
    if not isinstance(value, dict):
        raise RowError(f"weights must be an object {{principal: number}}; got {quote(value)}")
    weights: dict[str, float] = {}
    for name, weight in value.items():
        if name not in principal_names:
            known = ", ".join(principal_names) or "none"
            raise RowError(f"weights name the unknown principal {quote(name)}; principals: {known}")
        weights[name] = _check_weight(weight, name)
    return weights or None


def _parse_weights(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(
            f"weights must be an object {{principal: number}} or its JSON text; got {quote(text)}"
        ) from None


def _check_weight(weight: Any, name: str) -> float:
    if weight is None:  # a column of structs has no way to leave a field out: a map has
        raise RowError(f"the weight of {name} is null; give a number, or leave it out to keep the configured one")
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise RowError(f"the weight of {name} must be a number; got {quote(weight)}")
    try:
        number = float(weight)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise RowError(f"the weight of {name} must be finite and not negative; got {quote(weight)}")
    return number


def _read_response(value: Any, messages: Sequence[Message]) -> str | None:
    """The existing answer: a text, or a list of messages that ends with it and otherwise repeats the prompt."""
    if value is None:
        return None
    if isinstance(value, str):
        return check_text(value, "response")
    if not isinstance(value, list):
        raise RowError(f"response must be text or a list of messages; got {quote(value)}")
    *before, last = read_conversation(value, "response")
    if last["role"] != "assistant":
        raise RowError(f"the last of response must be the assistant's; its role is {last['role']}")
    if before and before != list(messages):
        raise RowError("response is a conversation with another prompt")
    return str(last["content"])
