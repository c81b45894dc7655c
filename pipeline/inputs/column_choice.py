"""Which columns of a file are read: the configured ones, or those of a format that is recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError
from pipeline.inputs.batch_bodies import TEMPLATE_KWARGS
from pipeline.inputs.record_formats import FORMAT_BY_NAME, RecordFormat, find_format
from pipeline.inputs.rows import TOOLS, InputColumns
from pipeline.quoting import quote

# keys of `input` that name a column
KEYS = ("prompt", "messages", "id", "weights", "response", "tools", "candidates", TEMPLATE_KWARGS)


def choose_columns(config: InputConfig, names: Sequence[str], file: str) -> InputColumns:
    """Choose among a file's columns: the configured ones, a recognised format's, `messages`, or else `prompt`.

    Raises:
        ConfigurationError: a configured column is missing, or there is none to read.
    """
    prompt, messages = config.prompt, config.messages
    recognised = _recognise(config, names, file)
    if recognised is None and prompt is None and messages is None:
        messages = "messages" if "messages" in names else None
        prompt = "prompt" if messages is None and "prompt" in names else None
    there = _there(names, file)
    if recognised is None and prompt is None and messages is None:
        raise ConfigurationError(
            f"there is no column messages and no column prompt; name one with input.prompt or input.messages; {there}"
        )
    columns = InputColumns(prompt, messages, config.id, config.weights, config.response)
    if recognised is not None:
        present = tuple(column for column in recognised.uses if column in names)
        columns = replace(columns, format=recognised.name, format_columns=present)
    if config.tools is not None or (TOOLS in names and (messages is not None or recognised is not None)):
        columns = replace(columns, tools=config.tools or TOOLS)
    if config.chat_template_kwargs is not None or TEMPLATE_KWARGS in names:
        columns = replace(columns, template_kwargs=config.chat_template_kwargs or TEMPLATE_KWARGS)
    columns = replace(columns, candidates=config.candidates)
    for key in KEYS:
        column = columns.template_kwargs if key == TEMPLATE_KWARGS else getattr(columns, key)
        if column is not None and column not in names:
            raise ConfigurationError(f"input.{key}: there is no column {quote(column)}; {there}")
    return columns


def named_columns(config: InputConfig) -> set[str]:
    """The columns that the configuration names."""
    named = {getattr(config, key) for key in KEYS} - {None}
    return named | (set() if config.format == "auto" else FORMAT_BY_NAME[config.format].columns)


def columns_of_unreadable(config: InputConfig) -> InputColumns:
    """The columns of a file without one readable object: each of its rows is a row error anyway."""
    prompt = config.prompt or (None if config.messages else "prompt")
    columns = InputColumns(prompt, config.messages, config.id, config.weights, config.response, tools=config.tools)
    return replace(columns, template_kwargs=config.chat_template_kwargs, candidates=config.candidates)


def _recognise(config: InputConfig, names: Sequence[str], file: str) -> RecordFormat | None:
    """The format that the configuration names, or that the columns show where it names no columns itself."""
    has_columns = config.prompt is not None or config.messages is not None
    if config.format == "auto":
        return None if has_columns else find_format(names)
    if has_columns:
        raise ConfigurationError(
            f"input.format: {config.format} reads columns of its own; leave out input.prompt and input.messages"
        )
    wanted = FORMAT_BY_NAME[config.format]
    if lacking := sorted(wanted.columns - set(names)):
        raise ConfigurationError(
            f"input.format: {config.format} needs the columns {', '.join(lacking)}, which {file} does not have; "
            f"{_there(names, file)}"
        )
    return wanted


def _there(names: Sequence[str], file: str) -> str:
    return f"columns of {file}: {', '.join(quote(name) for name in names) or 'none'}"
