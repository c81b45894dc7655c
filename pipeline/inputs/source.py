"""The input of a run: rows from files (see `listing`), a folder or pattern of them, or a `datasets` name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError, InputChanged, StorageError
from pipeline.inputs import jsonl, tabular
from pipeline.inputs.column_choice import choose_columns, columns_of_unreadable, named_columns
from pipeline.inputs.files import Format, FoundFile, InputFile, is_dataset_name
from pipeline.inputs.kept import choose_kept, read_kept
from pipeline.inputs.listing import find_dataset, find_files
from pipeline.inputs.record_formats import FORMAT_BY_NAME, WITH_ANSWER_COLUMN
from pipeline.inputs.row_ids import find_repeated_ids
from pipeline.inputs.rows import InputColumns, LastAssistant
from pipeline.inputs.tool_use import uses_tools
from pipeline.quoting import quote
from pipeline.records import Row

DEFAULT_STRIDE = 1024
NOTHING_KNOWN: Mapping[str, InputFile] = MappingProxyType({})
PEEK_ROWS = 100  # rows that show whether conversations end with an existing answer


@dataclass(frozen=True, slots=True)
class InputSource:
    """Rows by file and position. Plain data: it can be sent to the processes that read.

    A row id is the id column's value, a batch request's `custom_id`, or else "file name:row", where the row is the
    1-based line of a text file (element of a JSON array) and the 0-based row of a table or data set.

    Args:
        files: in order of name.
        principal_names: the names that a column of weights may use.
        column_names: every column that the files have, used or not; empty for an input that comes from a plan.
        not_read: files and folders in the input folder that are no input; empty for an input from a plan.
        kept: the columns that are carried into the output; None where there are none.
    """

    files: tuple[InputFile, ...]
    principal_names: tuple[str, ...] = ()
    column_names: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()
    kept: pa.Schema | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are used, over all files."""
        return sum(file.num_rows for file in self.files)

    @property
    def columns(self) -> InputColumns:
        """The columns that the first file is read by."""
        return self.files[0].columns

    def read_rows(self, file_index: int, start: int, stop: int) -> Iterator[Row]:
        """Yield rows [start, stop) of one file; blank JSONL lines are not rows. A bad row has `error` set.

        Of a Parquet file only the row groups with these rows are read; a JSONL file is read from the last mark at or
        before `start`.

        Raises:
            ValueError: the file has no such rows.
            ConfigurationError: the file is gone, damaged or shorter than planned.
        """
        file = self.files[file_index]
        if not 0 <= start <= stop <= file.num_rows:
            raise ValueError(f"rows must be within 0 and {file.num_rows}; got {start} to {stop}")
        if file.format.is_text:
            return jsonl.read_rows(file, start, stop, principal_names=self.principal_names)
        return tabular.read_rows(file, start, stop, principal_names=self.principal_names)

    def read_kept(self, file_index: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield the values of the kept columns of rows [start, stop) of one file, in the order of `read_rows`."""
        assert self.kept is not None
        return read_kept(self.kept, self.files[file_index], start, stop)

    def reading(self, **columns: Any) -> InputSource:
        """The same input with other fields of all files' columns."""
        return replace(
            self, files=tuple(replace(file, columns=replace(file.columns, **columns)) for file in self.files)
        )

    def __iter__(self) -> Iterator[Row]:
        """Every row in order."""
        return chain.from_iterable(self.read_rows(index, 0, file.num_rows) for index, file in enumerate(self.files))


def open_input(
    config: InputConfig,
    principal_names: Sequence[str] = (),
    *,
    stride: int = DEFAULT_STRIDE,
    known: Mapping[str, InputFile] = NOTHING_KNOWN,
) -> InputSource:
    """Find and check the input. Its rows are read only as far as counting, hashing and ids need.

    Args:
        config: where the input is, and which columns it has.
        principal_names: the names that a column of weights may use.
        stride: the distance in rows of the places in a text file where reading can begin: rows per shard.
        known: files by name as a run knows them, which must begin with the rows that they had.

    Raises:
        InputChanged: a known file is gone, has fewer rows, or others.
        ConfigurationError: no such input, missing column, wrong column type, no rows, an id column without ids.
    """
    if config.weights is not None and not principal_names:
        raise ConfigurationError("input.weights names a column of weights, but there are no principals")
    dataset = find_dataset(config.path, split=config.split, subset=config.subset)
    found = None if dataset is not None else find_files(config.path, split=config.split)
    column_names: dict[str, None] = {}
    if found is None:
        files = [_open_dataset(dataset or config.path, config, column_names, known)]
    else:
        files = list(_open_files(found.files, config, column_names, stride=stride, known=known))
    files = [file for file in files if file.num_rows]
    if not files:
        raise ConfigurationError(f"input.path: {config.path} holds no rows")
    for name in known.keys() - {file.name for file in files}:
        raise InputChanged(f"{name} is not in the input any more")
    not_read = () if found is None else found.not_read
    source = InputSource(tuple(files), tuple(principal_names), tuple(column_names), not_read)
    source = replace(source, kept=choose_kept(config.keep, files))
    if repeated_ids := find_repeated_ids(files):
        source = source.reading(repeated_ids=repeated_ids)
    return _with_existing_answers(_with_tools(source), config)


def is_unchanged(file: InputFile) -> bool:
    """Whether a planned file is there and has the rows that it had."""
    try:
        if file.format is Format.DATASET:
            return tabular.dataset_identity(file) == file.identity
        if file.format.is_text:
            text = jsonl.TextFile(file.path, file.format, file.layers, file.header)
            found = jsonl.scan(text, file.name, stride=DEFAULT_STRIDE, limit=file.num_rows, known=file)
            return found.has_known_rows
        listed = find_files(file.path)
        return listed is not None and tabular.content_identity(listed.files[0]) == file.identity
    except (ConfigurationError, StorageError):
        return False


def begin_of(file: InputFile, known: InputFile) -> InputFile:
    """The first rows of a file, as many as were `known` of it before, whatever they are now.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    if file.format.is_text:
        text = jsonl.TextFile(file.path, file.format, file.layers, file.header)
        found = jsonl.scan(text, file.name, stride=DEFAULT_STRIDE, limit=known.num_rows, known=known)
        file = replace(file, identity=found.identity, marks=found.marks)
    file = replace(file, num_rows=known.num_rows, columns=known.columns)
    return replace(file, identity=tabular.dataset_identity(file)) if file.format is Format.DATASET else file


def _open_files(
    found: Sequence[FoundFile],
    config: InputConfig,
    column_names: dict[str, None],
    *,
    stride: int,
    known: Mapping[str, InputFile],
) -> Iterator[InputFile]:
    rows_left = config.limit
    for each in found:
        if rows_left == 0:
            return
        earlier = known.get(each.name)
        if each.format.is_text:
            file = _open_text(each, config, column_names, stride=stride, limit=rows_left, known=earlier)
        else:
            file = _open_table(each, config, column_names, limit=rows_left, known=earlier)
        if rows_left is not None:
            rows_left -= file.num_rows
        yield file


def _open_text(
    found: FoundFile,
    config: InputConfig,
    column_names: dict[str, None],
    *,
    stride: int,
    limit: int | None,
    known: InputFile | None,
) -> InputFile:
    text, keys = jsonl.peek(found)
    keys = jsonl.add_late_keys(text, found.name, keys, named_columns(config))
    format_ = text.format
    if format_ is Format.BATCH and config.prompt is None and config.messages is None:
        columns = choose_columns(config, (*keys, "messages"), found.name)
        columns = replace(columns, id=config.id or "custom_id", body="body")
    else:
        format_ = Format.JSONL if format_ is Format.BATCH else format_
        columns = choose_columns(config, keys, found.name) if keys else columns_of_unreadable(config)
        if columns.format is not None and not text.header:  # a later line may have keys that the first ones lack
            columns = replace(columns, format_columns=FORMAT_BY_NAME[columns.format].uses)
    column_names.update(dict.fromkeys(keys))
    scan = jsonl.scan(text, found.name, stride=stride, limit=limit, known=known)
    if known is not None:
        _check_known(known, scan.num_rows, has_known_rows=scan.has_known_rows)
    return InputFile(
        path=found.path,
        name=found.name,
        format=format_,
        columns=columns,
        num_rows=scan.num_rows,
        identity=scan.identity,
        marks=scan.marks,
        layers=text.layers,
        header=text.header,
    )


def _open_table(
    found: FoundFile,
    config: InputConfig,
    column_names: dict[str, None],
    *,
    limit: int | None,
    known: InputFile | None,
) -> InputFile:
    schema, num_rows = tabular.read_schema(found)
    columns = _check_schema(schema, config, found.name, column_names)
    file = InputFile(
        path=found.path,
        name=found.name,
        format=found.format,
        columns=columns,
        num_rows=num_rows if limit is None else min(num_rows, limit),
        identity=tabular.content_identity(found),
    )
    if known is not None:
        _check_known(known, file.num_rows, has_known_rows=file.identity == known.identity)
    return file


def _check_known(known: InputFile, num_rows: int, *, has_known_rows: bool) -> None:
    if num_rows < known.num_rows:
        raise InputChanged(f"{known.name} has {num_rows:,} rows and had {known.num_rows:,}")
    if not has_known_rows:
        hint = (
            "" if known.format.is_text or known.format is Format.DATASET
            else "; a table is compared as a whole, so add rows in a file of their own, or let `cage retry RUN "
            "--input FILE` compare its rows one by one"
        )  # fmt: skip
        raise InputChanged(f"{known.name} has changed in its first {known.num_rows:,} rows{hint}")


def _open_dataset(
    path: str, config: InputConfig, column_names: dict[str, None], known: Mapping[str, InputFile]
) -> InputFile:
    if not is_dataset_name(path) and not Path(path).is_dir():
        raise ConfigurationError(f"input.path: there is no file or folder {quote(path)}")
    dataset = tabular.load_dataset(path, config.subset, config.split)
    name = ":".join(part for part in (_shown_name(path), config.subset, config.split) if part)
    columns = _check_schema(dataset.features.arrow_schema, config, name, column_names)
    kept = dataset.column_names if config.keep == "all" else [each for each in config.keep if each in column_names]
    file = InputFile(
        path=path,
        name=name,
        format=Format.DATASET,
        columns=columns,
        num_rows=len(dataset) if config.limit is None else min(len(dataset), config.limit),
        identity="",
        subset=config.subset,
        split=config.split,
        kept=tuple(kept),
    )
    if (earlier := known.get(name)) is not None:
        before = replace(file, num_rows=min(file.num_rows, earlier.num_rows))
        _check_known(earlier, file.num_rows, has_known_rows=tabular.dataset_identity(before) == earlier.identity)
    return replace(file, identity=tabular.dataset_identity(file))


def _shown_name(path: str) -> str:
    """What row ids call a data set: its name, or its folder's own name."""
    return Path(path).name if Path(path).is_absolute() else path


def _check_schema(schema: pa.Schema, config: InputConfig, name: str, column_names: dict[str, None]) -> InputColumns:
    columns = choose_columns(config, tuple(schema.names), name)
    tabular.check_types(schema, columns, name)
    column_names.update(dict.fromkeys(schema.names))
    return columns


def _with_tools(source: InputSource) -> InputSource:
    """Decide whether rows may have tools: where there is a column of them, or one of the first rows uses some."""
    with_tools = source.reading(has_tools=True)
    if any(file.columns.tools is not None for file in source.files):
        return with_tools
    first = islice(with_tools.reading(last_assistant=LastAssistant.RESPONSE), PEEK_ROWS)
    return with_tools if any(row.tools or uses_tools(row.messages) for row in first) else source


def _with_existing_answers(source: InputSource, config: InputConfig) -> InputSource:
    """Decide whether the run has existing answers: its output then has columns for them.

    The assistant's message at the end of a conversation is one where the configuration says so, and by default where
    one of the first rows has one.
    """
    has_response = any(
        file.columns.response is not None or file.columns.format in WITH_ANSWER_COLUMN for file in source.files
    )
    if config.last_assistant not in (None, LastAssistant.RESPONSE):
        return source.reading(last_assistant=config.last_assistant, has_response=has_response)
    with_answers = source.reading(last_assistant=LastAssistant.RESPONSE, has_response=True)
    if has_response or config.last_assistant is not None:
        return with_answers
    if any(row.response is not None for row in islice(with_answers, PEEK_ROWS)):
        return with_answers
    return source.reading(last_assistant=LastAssistant.UNEXPECTED)
