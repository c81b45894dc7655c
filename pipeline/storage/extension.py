"""A run whose input has grown: the same plan with more shards, which begins with all that it had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError, InputChanged
from pipeline.inputs.files import InputFile
from pipeline.inputs.kept import from_text
from pipeline.inputs.record_formats import WITH_ANSWER_COLUMN
from pipeline.inputs.source import InputSource, begin_of, open_input
from pipeline.quoting import one_line, quote
from pipeline.storage.fingerprint import describe_files, differing_fields
from pipeline.storage.plan import Plan, Shard, cut_file
from pipeline.stores.addresses import normal_address

FILES, LIMIT = "input.files.", "input.limit"
NEW_RUN = "answer these rows in a new run, at another output.path"


def is_extension(stored: Plan, fresh: Plan, *, with_new_rows: bool, with_limit: bool = True) -> bool:
    """Whether `fresh`, a plan of the same settings, may be the stored one with a larger input.

    Args:
        stored: of the run.
        fresh: of the input as it is now.
        with_new_rows: whether the input may have more rows than it had.
        with_limit: whether `input.limit` may be larger, so that more of the input's rows are used.
    """
    before, after = stored.fingerprint, fresh.as_begun(stored).fingerprint
    differing = differing_fields(before, after)
    if not differing or any(key != LIMIT and not key.startswith(FILES) for key in differing):
        return False
    if LIMIT not in differing:
        return with_new_rows
    old, new = before.get(LIMIT), after.get(LIMIT)
    return with_limit and old is not None and (new is None or new > old)


def describe_extension(plan: Plan) -> str:
    """One line on what an extended plan has more than before."""
    before = plan.earlier[-1]
    rows, shards = plan.num_rows - before.num_rows, len(plan.shards) - before.num_shards
    added = f"{rows:,} row{'s' * (rows != 1)} in {shards:,} shard{'s' * (shards != 1)}"
    return f"the run is extended by {added}, to {plan.num_rows:,} rows"


def extend_plan(path: str, stored: Plan, fresh: Plan, config: Config) -> Plan:
    """The stored plan with shards for what the input has beyond it; the shards that it has stay as they are.

    Args:
        path: of the run, for messages.
        stored: its plan.
        fresh: of the input as it is now, with the same settings.
        config: of `fresh`.

    Raises:
        InputChanged: a row that the run has is gone or another one.
        ConfigurationError: the new rows do not fit the columns of the run.
    """
    known = {file.name: file for file in stored.files}
    try:
        source = open_input(config.input, stored.principal_names, stride=stored.rows_per_shard, known=known)
    except InputChanged as error:
        raise InputChanged(
            f"{path} cannot be extended: {error}. New files and rows at the end of files extend a run; rows that "
            "were mended are run again by `cage retry RUN --input FILE`. Anything else is a new run: choose another "
            "output.path, or add --new-run to write beside it."
        ) from None
    files = fit_source(path, stored, source).files
    order = [*known, *(file.name for file in files if file.name not in known)]
    by_name = {file.name: file for file in files}
    files = tuple(by_name[name] for name in order)
    fresh = fresh.as_begun(stored)
    return replace(
        stored,
        fingerprint=fresh.fingerprint,
        files=files,
        shards=tuple(_shards(stored, files)),
        models=fresh.models,
        config=fresh.config,
        earlier=(*stored.earlier, stored.extent),
    )


def adopt(stored: Plan, source: InputSource) -> Plan:
    """The stored plan with the files of a mended input that are its own, mended in place; the same plan for none.

    All rows of these files that differ from those of the run must have been run again.
    """
    mended = {file.name: file for file in source.files}
    files = tuple(
        begin_of(mended[file.name], file)
        if file.name in mended
        and normal_address(mended[file.name].path) == normal_address(file.path)
        and mended[file.name].num_rows >= file.num_rows
        else file
        for file in stored.files
    )
    fields = {**stored.fingerprint, **describe_files(files)}
    if fields == stored.fingerprint:
        return stored
    shards, earlier = tuple(_shards(stored, files)), (*stored.earlier, stored.extent)
    return replace(stored, fingerprint=fields, files=files, shards=shards, earlier=earlier)


def fit_source(path: str, stored: Plan, source: InputSource) -> InputSource:
    """The input as the run reads it: with its existing answers, tools and kept columns, which its files have or lack.

    Raises:
        ConfigurationError: it has what the run's files have no columns for.
    """
    first = stored.files[0].columns
    if not stored.has_response:
        for file in source.files:
            if file.columns.response is not None or file.columns.format in WITH_ANSWER_COLUMN:
                raise ConfigurationError(
                    f"{file.name} has existing answers, and the files of {path} have no columns for them; {NEW_RUN}"
                )
    _check_kept(path, from_text(stored.kept), source.kept)
    known = {file.name: file.columns for file in stored.files}
    repeated_ids = source.columns.repeated_ids
    source = source.reading(
        has_response=first.has_response, last_assistant=first.last_assistant, has_tools=first.has_tools
    )
    files = [replace(file, columns=known.get(file.name, file.columns)) for file in source.files]
    return replace(source, files=tuple(files)).reading(repeated_ids=repeated_ids)


def _check_kept(path: str, before: pa.Schema | None, after: pa.Schema | None) -> None:
    """Refuse columns to keep that the run does not have, or has with another type."""
    fields: dict[str, Any] = {} if before is None else {field.name: field for field in before}
    for field in after or ():
        earlier = fields.get(field.name)
        if earlier is None:
            raise ConfigurationError(
                f"input.keep: the new rows have the column {quote(field.name)}, and the files of {path} "
                f"do not; {NEW_RUN}"
            )
        if not field.equals(earlier, check_metadata=True):
            raise ConfigurationError(
                f"input.keep: with the new rows the column {quote(field.name)} holds {one_line(str(field.type))}, "
                f"and {one_line(str(earlier.type))} in the files of {path}; {NEW_RUN}"
            )


def _shards(stored: Plan, files: Sequence[InputFile]) -> Iterator[Shard]:
    """The stored shards, at their places in the files of today; then those of the new rows, file by file."""
    places = [{row: (offset, line) for row, offset, line in file.marks} for file in files]
    for shard in stored.shards:
        offset, line = places[shard.file][shard.start] if files[shard.file].marks else (0, 0)
        yield replace(shard, offset=offset, line=line)
    index = len(stored.shards)
    for number in range(len(files)):
        num_known = stored.files[number].num_rows if number < len(stored.files) else 0
        for shard in cut_file(files, number, num_known, stored.rows_per_shard, index=index):
            yield shard
            index += 1
