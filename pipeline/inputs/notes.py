"""What the plan says about an input: what is recognised, and whatever of it has no effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pipeline.config.sections import Config, DecodingConfig
from pipeline.inputs.conversations import REASONING_KEYS
from pipeline.inputs.files import Format
from pipeline.inputs.kept import AS_JSON
from pipeline.inputs.record_formats import FORMAT_BY_NAME
from pipeline.inputs.rows import LastAssistant
from pipeline.inputs.source import InputSource
from pipeline.quoting import quote
from pipeline.records import Row

FIRST_ROWS = 100
SHOWN = 3  # values named in a note
SHOWN_FILES = 10
# parameters of requests that are set for the whole run, by the key of `decoding` that sets them
OF_THE_RUN = {"temperature": "temperature", "top_p": "top_p", "n": "n"}


def describe_columns(source: InputSource) -> str:
    """Which columns of the first file are read and for what, and which ones are not read."""
    columns = source.columns
    read = {
        columns.prompt: "the prompt",
        columns.messages: "the conversation",
        columns.id: "row ids",
        columns.response: "the existing answer",
        columns.weights: "weights by principal",
    }
    used = {name: use for name, use in read.items() if name is not None}
    shown = [f"{_column(name)} ({use})" for name, use in used.items()]
    if columns.id is None and columns.body is None:
        shown.append("no column of ids, so rows are named by file and number")
    kept = () if source.kept is None else (field.name for field in source.kept)
    others = {columns.tools, columns.template_kwargs, columns.body, *columns.format_columns, *kept}
    not_read = [name for name in source.column_names if name not in used and name not in others]
    return f"columns: {', '.join(shown)}" + (f"; not read: {_listed(not_read)}" if not_read else "")


def describe_input(source: InputSource, config: Config) -> tuple[str, ...]:
    """Notes on an input, one line each. All of a batch file is read, of other inputs the first rows.

    Raises:
        ConfigurationError: the input is gone or damaged.
    """
    return (
        *_on_files(source),
        *_on_kept(source),
        *_on_first_rows(source, config),
        *_on_requests(source, config.decoding),
    )


def _on_files(source: InputSource) -> Iterator[str]:
    if source.not_read:
        shown = ", ".join(quote(name) for name in source.not_read[:SHOWN_FILES])
        more = len(source.not_read) - SHOWN_FILES
        yield f"not read: {shown}" + (f" and {more:,} more" if more > 0 else "") + " (no input by their names)"


def _column(name: str) -> str:
    return quote(name)[1:-1]


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN_FILES
    return ", ".join(map(_column, names[:SHOWN_FILES])) + (f" and {more:,} more" if more > 0 else "")


def _on_kept(source: InputSource) -> Iterator[str]:
    if source.kept is not None:
        shown = ", ".join(
            quote(field.name) + (" (as JSON text)" if field.metadata == AS_JSON else "")
            for field in list(source.kept)[:SHOWN_FILES]
        )
        more = len(source.kept) - SHOWN_FILES
        yield f"kept in the output: {shown}" + (f" and {more:,} more" if more > 0 else "")


def _on_first_rows(source: InputSource, config: Config) -> Iterator[str]:
    rows = list(islice(source, FIRST_ROWS))
    first = f"the first {len(rows):,} rows" if len(rows) < source.num_rows else f"the {len(rows):,} rows"
    configured = {name: principal.weight for name, principal in config.principals.items()}
    yield from _on_reading(source)
    num_names = sum(row.num_names for row in rows)
    if num_names:
        yield f"messages: the names of speakers are dropped ({num_names:,} in {first})"
    num_reasoning = sum(row.num_reasoning for row in rows)
    if num_reasoning:
        yield (
            f"messages: reasoning in a field of its own ({', '.join(REASONING_KEYS)}) is not read "
            f"({num_reasoning:,} in {first})"
        )
    num_json = sum(row.is_json_prompt for row in rows)
    if num_json:
        yield f"prompt: text that is the JSON of messages is read as a conversation ({num_json:,} in {first})"
    weights = [{**configured, **(row.weights or {})} for row in rows if row.error is None]
    num_zero = sum(not any(each.values()) for each in weights)
    if configured and num_zero:
        yield (f"weights: every principal has weight 0 in {num_zero:,} of {first}: the base answers as it does alone")


def _on_reading(source: InputSource) -> Iterator[str]:
    """How records are read, where the configuration does not say so."""
    names = dict.fromkeys(file.columns.format for file in source.files)
    for name in filter(None, names):
        files = [file for file in source.files if file.columns.format == name]
        columns = dict.fromkeys(
            column for file in files for column in file.columns.format_columns if column in source.column_names
        )
        answer = ""
        if files[0].columns.has_response and files[0].columns.response is None:
            answer = f"; the existing answer is {FORMAT_BY_NAME[name].answer}"
        yield f"format: {name}, recognised by its columns; read are {', '.join(columns)}{answer}"
    if None in names and source.columns.has_response and source.columns.response is None:
        yield "messages: where the last one is the assistant's, it is the existing answer to compare with"
    if source.columns.tools is not None:
        yield f"tools: the column {quote(source.columns.tools)[1:-1]} has what the model may call"
    elif "tools" in source.column_names:
        yield "tools: the column tools is not read; input.tools=tools makes it what the model may call"
    if source.columns.template_kwargs is not None:
        column = quote(source.columns.template_kwargs)[1:-1]
        yield f"chat templates: the column {column} has values that they read besides the messages"
    if source.columns.last_assistant is LastAssistant.PREFILL:
        yield "messages: where the last one is the assistant's, the new answer begins with it"


def _on_requests(source: InputSource, decoding: DecodingConfig) -> Iterator[str]:
    """What of the parameters of batch requests has no effect."""
    num_obeyed = num_cut = num_efforts = 0
    ignored: Counter[str] = Counter()
    values: dict[str, dict[str, None]] = {}
    for row in _requests(source):
        num_obeyed += any(each is not None for each in (row.max_new_tokens, row.seed, row.stop))
        num_efforts += bool(row.wished_kwargs)
        num_cut += (row.max_new_tokens or 0) > decoding.max_new_tokens
        for name, value in row.not_obeyed:
            if name not in OF_THE_RUN or value != getattr(decoding, OF_THE_RUN[name]):
                ignored[name] += 1
                shown = values.setdefault(name, {})
                if len(shown) <= SHOWN:
                    shown[quote(value, limit=30)] = None
    if num_obeyed:
        yield f"requests: the length limits, seeds and stop strings of {num_obeyed:,} requests are obeyed row by row"
    if num_cut:
        yield (
            f"requests: the length limits of {num_cut:,} requests are above decoding.max_new_tokens, "
            f"so their answers end at {decoding.max_new_tokens:,} tokens"
        )
    if num_efforts:
        yield f"requests: reasoning_effort of {num_efforts:,} requests goes to the chat templates that read it"
    for name, count in ignored.items():
        note = f"requests: {quote(name)[1:-1]} of {count:,} requests is not obeyed ({_shown(values[name])})"
        if name in OF_THE_RUN:
            note += f": decoding.{OF_THE_RUN[name]} is {getattr(decoding, OF_THE_RUN[name]):g} for every row"
        yield note


def _requests(source: InputSource) -> Iterator[Row]:
    for index, file in enumerate(source.files):
        if file.format is Format.BATCH:
            yield from source.read_rows(index, 0, file.num_rows)


def _shown(values: dict[str, Any]) -> str:
    names = list(values)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
