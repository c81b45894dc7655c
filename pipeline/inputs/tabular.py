"""Inputs with typed columns: Parquet, Arrow, `datasets`. Only the needed columns and row groups are read."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigurationError
from pipeline.inputs import arrow_files
from pipeline.inputs.files import Format, FoundFile, InputFile, as_input_error, open_bytes
from pipeline.inputs.record_formats import CONVERSATION_COLUMNS, OTHER_COLUMNS
from pipeline.inputs.rows import FoundId, InputColumns, Unreadable, make_row, read_id
from pipeline.quoting import one_line, quote
from pipeline.records import Row

BATCH_ROWS = 1024
PROMPT = "text, or a list of {role, content}"
CONVERSATION = "a list of {role, content} with text in both, or that list as JSON text"
BATCH_BYTES = 32 * 2**20  # of decoded values at once, so that a few large rows cost no more than many small ones
INTEGER_FIELD = 0x15  # of Thrift's compact protocol: the next field, a 32-bit integer
DICTIONARY_PAGE = 2
REPEATED_BYTES = 256 * 2**20  # of decoded values at once, where all rows have a column's longest value
HASH_BLOCK_BYTES = 2**20
FLOAT_IDS = (
    "; pandas makes floats of whole numbers where one is missing: give every row an id, then write the column with "
    "astype('int64') or astype(str)"
)
# Pages are read one after the other, so that a row group need not fit into memory.
PARQUET_OPTIONS: dict[str, Any] = {"pre_buffer": False, "buffer_size": 2**20, "arrow_extensions_enabled": True}


def read_schema(found: FoundFile) -> tuple[pa.Schema, int]:
    """The schema and the number of rows of a Parquet or Arrow file."""
    with as_input_error(found.name):
        if found.format is Format.ARROW:
            return arrow_files.read_schema(found.path)
        with open_bytes(found.path) as handle, pq.ParquetFile(handle, **PARQUET_OPTIONS) as file:
            return file.schema_arrow, file.metadata.num_rows


def content_identity(found: FoundFile) -> str:
    """A content hash of a local file; the store's tag and the size of an object."""
    if found.tag is not None:
        return f"etag:{found.tag.strip(chr(34))}:{found.size}"
    digest = hashlib.sha256()
    with as_input_error(found.name), open_bytes(found.path) as handle:
        while block := handle.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def dataset_identity(file: InputFile) -> str:
    """A content hash of the columns that are used."""
    digest = hashlib.sha256()
    names = tuple(dict.fromkeys((*file.columns.names, *file.kept)))
    for batch in _batches(file, names, 0, file.num_rows):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema.remove_metadata()) as writer:
            writer.write_batch(batch.replace_schema_metadata(None))
        digest.update(sink.getvalue())
    return f"sha256:{digest.hexdigest()}"


@functools.lru_cache(maxsize=4)
def load_dataset(path: str, subset: str | None, split: str) -> Any:
    """Load a data set by name.

    Raises:
        ConfigurationError: there is neither such a path nor a loadable data set.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # the library raises many kinds, its network clients more
        reason = one_line(error.__cause__ or error)
        if Path(path).is_dir():
            raise ConfigurationError(f"input.path: the data set in {path} cannot be loaded: {reason}") from error
        raise ConfigurationError(
            f"input.path: there is no file or folder {quote(path)}, and no data set of this name can be loaded: "
            f"{reason}"
        ) from error
    return dataset.with_format("arrow")


def check_types(schema: pa.Schema, columns: InputColumns, name: str) -> None:
    """Refuse a column whose type can never hold what it is named for.

    Raises:
        ConfigurationError: naming the column, its type and what it must hold.
    """
    wanted: list[tuple[str | None, Callable[[pa.DataType], bool], str]] = [
        (columns.prompt, _is_text_or_messages, PROMPT),
        (columns.messages, _is_conversation, CONVERSATION),
        (columns.id, _is_id, "text or whole numbers (or UUIDs)"),
        (columns.weights, _is_weights, "a struct or map of principal to number, or that as JSON text"),
        (columns.response, _is_text_or_messages, PROMPT),
    ]
    if columns.tools is not None:
        wanted.append((columns.tools, _is_tools, "a list of tools, or that list as JSON text"))
    if columns.template_kwargs is not None:
        wanted.append((columns.template_kwargs, _is_object, "a struct, a map or an object as JSON text"))
    if columns.candidates is not None:
        wanted.append((columns.candidates, _is_answers, "a list of texts or of {text, weight}, or that as JSON text"))
    for its_column in columns.format_columns:
        if its_column in CONVERSATION_COLUMNS:
            wanted.append((its_column, _is_conversation, CONVERSATION))
        elif its_column not in OTHER_COLUMNS:
            wanted.append((its_column, _is_text, "text"))
    for column, accepts, what in wanted:
        if column is None:
            continue
        if schema.names.count(column) > 1:
            raise ConfigurationError(f"{name} has more than one column {quote(column)}")
        type_ = schema.field(column).type
        if not (pa.types.is_null(type_) or accepts(type_)):
            shown = one_line(str(type_), limit=120)
            hint = FLOAT_IDS if column == columns.id and pa.types.is_floating(type_) else ""
            raise ConfigurationError(
                f"the column {one_line(column)} of {name} has type {shown}; it must hold {what}{hint}"
            )


def read_rows(file: InputFile, start: int, stop: int, *, principal_names: Sequence[str]) -> Iterator[Row]:
    """Yield rows [start, stop) of a file or data set; without an id column a row's id is name:row, from 0."""
    columns = file.columns
    for number, record in _records(file, columns.names, start, stop):
        place, row_id = f"row {number} of {file.name}", f"{file.name}:{number}"
        row = make_row(record, columns, row_id=row_id, place=place, principal_names=principal_names)
        yield replace(row, file=file.name, number=number)


def schema_of(file: InputFile) -> pa.Schema:
    """The schema of a file or data set."""
    if file.format is Format.DATASET:
        return load_dataset(file.path, file.subset, file.split or "train").features.arrow_schema
    return read_schema(FoundFile(file.path, file.name, file.format, size=0))[0]


def read_values(file: InputFile, names: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yield the values of rows [start, stop) by column; those columns of `names` that the file has."""
    there = set(schema_of(file).names)
    for _, record in _records(file, [name for name in names if name in there], start, stop):
        yield record


def read_ids(file: InputFile) -> Iterator[FoundId]:
    """Yield the id of every row; None: null, blank or not readable."""
    assert file.columns.id is not None
    for number, record in _records(file, (file.columns.id,), 0, file.num_rows):
        row_id = read_id(record[file.columns.id])
        yield FoundId(row_id, f"{file.name}:{number}", f"row {number} of {file.name}")


def _records(file: InputFile, names: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    number = start
    for batch in _batches(file, names, start, stop):
        with as_input_error(file.name):
            columns = {name: _values(batch.column(batch.schema.get_field_index(name))) for name in names}
        for index in range(batch.num_rows):
            yield number, {name: values[index] for name, values in columns.items()}
            number += 1
    if number < stop:
        raise ConfigurationError(f"{file.name} is shorter than when the run was planned")


def _values(column: pa.Array) -> list[Any]:
    """Python values; where one cannot be decoded the others are kept."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # UnicodeDecodeError is a ValueError
        return [_scalar(column[index]) for index in range(len(column))]


def _scalar(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unreadable("is not valid UTF-8")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return Unreadable(f"is not readable: {quote(str(error))}")


def _batches(file: InputFile, names: Sequence[str], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    with as_input_error(file.name):
        if file.format is Format.DATASET:
            yield from _dataset_batches(file, names, start, stop)
        elif file.format is Format.ARROW:
            yield from arrow_files.read_batches(file.path, names, start, stop, BATCH_ROWS)
        else:
            yield from _parquet_batches(file, names, start, stop)


def _dataset_batches(file: InputFile, names: Sequence[str], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    dataset = load_dataset(file.path, file.subset, file.split or "train").select_columns(list(names))
    stop = min(stop, len(dataset))
    for low in range(start, stop, BATCH_ROWS):
        yield from dataset[low : min(low + BATCH_ROWS, stop)].combine_chunks().to_batches()


def _parquet_batches(file: InputFile, names: Sequence[str], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    with open_bytes(file.path) as handle, pq.ParquetFile(handle, **PARQUET_OPTIONS) as table:
        first = 0
        for group in range(table.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows
            low, high = max(start, first), min(stop, last)
            if low < high:
                batch_rows = _batch_rows(handle, table.metadata.row_group(group), names)
                yield from _group_batches(table, group, names, low - first, high - first, batch_rows)
            first = last


def _group_batches(
    table: Any, group: int, names: Sequence[str], low: int, high: int, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    seen = 0
    for batch in table.iter_batches(batch_rows, row_groups=[group], columns=list(names), use_threads=False):
        begin, end = max(low - seen, 0), min(high - seen, batch.num_rows)
        if begin < end:
            yield batch.slice(begin, end - begin)
        seen += batch.num_rows
        if seen >= high:
            return


def _batch_rows(handle: Any, group: Any, names: Sequence[str]) -> int:
    """Rows of a row group that are decoded at once.

    A column with a dictionary may repeat its longest value in every row, and only the dictionary's size says how long
    that can be: a small file may stand for terabytes.
    """
    usual = int(BATCH_BYTES * group.num_rows // max(1, group.total_byte_size))
    columns = [group.column(at) for at in range(group.num_columns)]
    repeated = [
        _dictionary_bytes(handle, each)
        for each in columns
        if each.has_dictionary_page and each.path_in_schema.partition(".")[0] in names
    ]
    safe = int(REPEATED_BYTES // max(1, max(repeated, default=1)))
    return max(1, min(BATCH_ROWS, usual, safe))


def _dictionary_bytes(handle: Any, column: Any) -> int:
    """Bytes of a column's dictionary, from the header of its page; of the whole column where that cannot be read.

    A header begins with three numbers in Thrift's compact protocol: the kind of page, its size in memory and its size
    in the file (https://parquet.apache.org/docs/file-format/data-pages/).
    """
    whole = int(column.total_uncompressed_size)
    offset = column.dictionary_page_offset
    if not offset:
        return whole
    handle.seek(offset)
    header = handle.read(24)
    numbers: list[int] = []
    at = 0
    while len(numbers) < 2:
        if at >= len(header) or header[at] != INTEGER_FIELD:
            return whole
        number, shift, at = 0, 0, at + 1
        while at < len(header):
            number |= (header[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if header[at - 1] < 0x80:
                break
        numbers.append((number >> 1) ^ -(number & 1))
    kind, size = numbers
    return size if kind == DICTIONARY_PAGE and 0 <= size <= whole else whole


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    return bool(is_text or pa.types.is_null(type_))


def _is_conversation(type_: pa.DataType) -> bool:
    """A list of messages, or the text of one: JSON or a transcript."""
    return _is_text(type_) or isinstance(type_, pa.JsonType) or _is_messages(type_)


def _is_text_or_messages(type_: pa.DataType) -> bool:
    return _is_text(type_) or _is_messages(type_)


def _is_messages(type_: pa.DataType) -> bool:
    if not _is_list(type_) or not pa.types.is_struct(type_.value_type):
        return False
    fields = {field.name: field.type for field in type_.value_type}
    return any(
        speaker in fields and _is_text(fields[speaker]) and said in fields and _is_content(fields[said])
        for speaker, said in (("role", "content"), ("from", "value"))
    )


def _is_tools(type_: pa.DataType) -> bool:
    is_list = _is_list(type_) and pa.types.is_struct(type_.value_type)
    return is_list or _is_text(type_) or isinstance(type_, pa.JsonType)


def _is_answers(type_: pa.DataType) -> bool:
    is_list = _is_list(type_) and (_is_text(type_.value_type) or pa.types.is_struct(type_.value_type))
    return is_list or _is_text(type_) or isinstance(type_, pa.JsonType)


def _is_object(type_: pa.DataType) -> bool:
    is_map = pa.types.is_map(type_) and _is_text(type_.key_type)
    return bool(pa.types.is_struct(type_)) or is_map or _is_text(type_) or isinstance(type_, pa.JsonType)


def _is_content(type_: pa.DataType) -> bool:
    """Text, or a list of parts."""
    return _is_text(type_) or (
        _is_list(type_) and (pa.types.is_struct(type_.value_type) or _is_text(type_.value_type))
    )


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_id(type_: pa.DataType) -> bool:
    return _is_text(type_) or bool(pa.types.is_integer(type_)) or isinstance(type_, pa.UuidType)


def _is_weights(type_: pa.DataType) -> bool:
    if _is_text(type_) or isinstance(type_, pa.JsonType):
        return True
    if pa.types.is_map(type_):
        return _is_text(type_.key_type) and _is_number(type_.item_type)
    return bool(pa.types.is_struct(type_)) and all(_is_number(field.type) for field in type_)


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_null(type_))
