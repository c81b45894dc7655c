"""Columns of the input that are carried into the output as they are (`input.keep`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigurationError
from pipeline.inputs import jsonl, tabular
from pipeline.inputs.files import InputFile
from pipeline.inputs.rows import Unreadable
from pipeline.quoting import one_line, quote
from pipeline.records import is_reserved

AS_JSON = {b"cage.kept": b"json"}  # of a field: its values are JSON text, because their types differ or are nested
INT64 = range(-(2**63), 2**63)
EXACT = range(-(2**53), 2**53 + 1)  # whole numbers that a float holds exactly


def choose_kept(keep: Sequence[str] | Literal["all"], files: Sequence[InputFile]) -> pa.Schema | None:
    """The columns to carry over, with one type for all files; None where there are none.

    Text is read as a whole for this: a type must hold every value.

    Raises:
        ConfigurationError: a column that is not there, has a name of the output, or types that do not agree.
    """
    if not keep:
        return None
    schemas = [_schema_of(file) for file in files]
    there = dict.fromkeys(name for schema in schemas for name in schema.names)
    if keep == "all":
        # What is read under a name of the output is there already.
        read = {name for file in files for name in file.columns.names}
        names = [name for name in there if not (name in read and is_reserved(name))]
    else:
        names = list(dict.fromkeys(keep))
        if missing := next((name for name in names if name not in there), None):
            shown = ", ".join(quote(name) for name in there)
            raise ConfigurationError(f"input.keep: there is no column {quote(missing)}; columns: {shown}")
    if reserved := [name for name in names if is_reserved(name)]:
        raise ConfigurationError(
            f"input.keep: the output has columns of its own named {', '.join(map(quote, reserved))}; rename them in "
            "the input, or list in input.keep the columns to keep without them"
        )
    schema = pa.schema([_one_field(name, schemas, files) for name in names])
    for field in schema:
        _check_storable(field)
    return schema


def to_text(schema: pa.Schema | None) -> str | None:
    """The schema as a plan stores it."""
    return None if schema is None else base64.b64encode(schema.serialize()).decode()


def from_text(text: str | None) -> pa.Schema | None:
    """The schema that a plan stored. Raises ValueError."""
    return None if text is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def read_kept(schema: pa.Schema, file: InputFile, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yield the values to carry over of the rows [start, stop); those of a row that cannot be read are null."""
    if file.format.is_text:
        records: Iterable[Mapping[str, Any]] = jsonl.read_values(file, start, stop)
    else:
        records = tabular.read_values(file, schema.names, start, stop)
    as_json = {field.name for field in schema if field.metadata == AS_JSON}
    for record in records:
        yield {name: _stored(record.get(name), as_json=name in as_json) for name in schema.names}


def append_kept(table: pa.Table, schema: pa.Schema, values: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Append the columns of `schema` to a table with as many rows as `values`.

    Raises:
        ConfigurationError: a value has another type than when the run was planned.
    """
    for field in schema:
        try:
            column = pa.array([each[field.name] for each in values], type=field.type)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ConfigurationError(
                f"the column {quote(field.name)} of the input has other values than when the run was planned: "
                f"{one_line(error)}"
            ) from error
        table = table.append_column(field, column)
    return table


def _schema_of(file: InputFile) -> pa.Schema:
    if not file.format.is_text:
        return pa.schema([pa.field(field.name, _plain(field.type)) for field in tabular.schema_of(file)])
    if file.header:
        return pa.schema([(name, pa.string()) for name in file.header])
    kinds: dict[str, set[str]] = {}
    for record in jsonl.read_values(file, 0, file.num_rows):
        for name, value in record.items():
            kinds.setdefault(name, set()).add(_kind(value))
    return pa.schema([_field_of_kinds(name, found - {"null"}) for name, found in kinds.items()])


def _kind(value: Any) -> str:
    """The kind of a JSON value: one that a column can have, or "any"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if value in EXACT else "long" if value in INT64 else "any"
    if isinstance(value, str):
        return "text" if _is_storable(value) else "any"
    return "float" if isinstance(value, float) else "any"


def _is_storable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate; JSON text escapes it
        return False
    return True


def _field_of_kinds(name: str, kinds: set[str]) -> pa.Field:
    if not kinds:
        return pa.field(name, pa.null())
    if kinds == {"int", "float"}:
        return pa.field(name, pa.float64())
    kinds = {"int" if kind == "long" else kind for kind in kinds}  # beside fractions it would lose digits
    if kinds == {"int", "float"}:
        return pa.field(name, pa.string(), metadata=AS_JSON)
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}
    if len(kinds) == 1 and (kind := next(iter(kinds))) in types:
        return pa.field(name, types[kind])
    return pa.field(name, pa.string(), metadata=AS_JSON)


def _plain(type_: pa.DataType) -> pa.DataType:
    """The type that values are stored with: without an encoding or an extension that readers may not know."""
    if isinstance(type_, (pa.UuidType, pa.JsonType)) or pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type)
    if pa.types.is_binary_view(type_):
        return pa.binary()
    return type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_


def _one_field(name: str, schemas: Sequence[pa.Schema], files: Sequence[InputFile]) -> pa.Field:
    """One type for a column of several files. Where it is null in all of them, it is text."""
    fields = [schema.field(name) for schema in schemas if name in schema.names]
    typed = [field for field in fields if not pa.types.is_null(field.type)]
    if not typed:
        return pa.field(name, pa.string())
    as_json = [field.metadata == AS_JSON for field in typed]
    is_json = all(file.format.is_text and not file.header for file in files)
    try:
        if any(as_json) and not all(as_json):
            raise pa.ArrowTypeError("JSON text is not the value itself")
        unified = pa.unify_schemas([pa.schema([field]) for field in typed], promote_options="permissive")
    except pa.ArrowException:
        if is_json:
            return pa.field(name, pa.string(), metadata=AS_JSON)
        shown = one_line(", ".join(dict.fromkeys(str(field.type) for field in typed)), limit=120)
        raise ConfigurationError(
            f"input.keep: the types of the column {quote(name)} do not agree from file to file: {shown}; convert it, "
            "or list in input.keep the columns to keep without it"
        ) from None
    return unified.field(name)


def _check_storable(field: pa.Field) -> None:
    """Refuse a type that Parquet does not have, such as a struct without fields, before anything is decoded."""
    try:
        pq.write_table(pa.schema([field]).empty_table(), pa.BufferOutputStream())
    except pa.ArrowException:
        raise ConfigurationError(
            f"input.keep: Parquet, as which the output is written, has no type for the column {quote(field.name)} "
            f"({field.type}); convert it, or list in input.keep the columns to keep without it"
        ) from None


def _stored(value: Any, *, as_json: bool) -> Any:
    if value is None or isinstance(value, Unreadable):
        return None
    if as_json:
        return json.dumps(value, ensure_ascii=True)
    return str(value) if isinstance(value, UUID) else value
