"""Text inputs (JSON lines, JSON arrays, CSV, TSV): one pass counts, hashes and marks; then rows from any mark."""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from pipeline.errors import ConfigurationError, RowError
from pipeline.inputs.delimited import DELIMITERS, read_header, split_rows
from pipeline.inputs.encodings import find_encoding, open_text
from pipeline.inputs.files import Format, FoundFile, InputFile, as_input_error
from pipeline.inputs.given import given_text
from pipeline.inputs.json_arrays import is_array, split_items
from pipeline.inputs.prefix_digest import PrefixDigest
from pipeline.inputs.responses_items import as_chat_body, is_responses_request
from pipeline.inputs.rows import FoundId, Unreadable, make_row, read_id
from pipeline.inputs.text_records import LIMIT_BYTES, TextRecord, without_mark
from pipeline.quoting import quote
from pipeline.records import Row

LINE_LIMIT_BYTES = LIMIT_BYTES
PEEK_ROWS = 100


@dataclass(frozen=True, slots=True)
class TextFile:
    """How a text file is read.

    Args:
        path: opens it.
        format: what it holds.
        layers: the compression and the encoding around its text (`find_encoding`).
        header: the columns of a CSV or TSV file.
    """

    path: str
    format: Format
    layers: tuple[str, ...] = ()
    header: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over a file finds: see the fields of `InputFile` with the same names.

    `has_known_rows` says whether the file begins with the rows that were known before.
    """

    num_rows: int
    identity: str
    marks: tuple[tuple[int, int, int], ...]
    has_known_rows: bool = True


def peek(found: FoundFile) -> tuple[TextFile, tuple[str, ...]]:
    """Find out how a file is read; collect the keys of its first objects in order of appearance.

    Raises:
        ConfigurationError: it holds something else.
    """
    keys: dict[str, None] = {}
    num_objects = num_broken = 0
    with as_input_error(found.name):
        file = _recognise(found)
        if file.header:
            return file, file.header
        with open_text(file.path, file.layers) as handle:
            for each in _split(handle, file):
                try:
                    record = _parse(each.data)
                except RowError:
                    num_broken += 1
                    continue
                if num_objects == 0 and file.format is Format.JSONL and _is_batch_request(record):
                    file = replace(file, format=Format.BATCH)
                keys.update(dict.fromkeys(record))
                num_objects += 1
                if num_objects == PEEK_ROWS:
                    break
    if num_broken and not num_objects and found.format is Format.JSON and file.format is Format.JSONL:
        raise ConfigurationError(f"{found.name} holds neither an array of objects nor one object per line")
    return file, tuple(keys)


def add_late_keys(file: TextFile, name: str, keys: tuple[str, ...], wanted: Collection[str]) -> tuple[str, ...]:
    """The keys of the first objects, and those of `wanted` that a later one has."""
    missing = set(wanted) - set(keys)
    if not missing or not keys or file.header:
        return keys
    with as_input_error(name), open_text(file.path, file.layers) as handle:
        for each in _split(handle, file):
            with contextlib.suppress(RowError):
                late = missing & _parse(each.data).keys()
                keys += tuple(sorted(late))
                missing -= late
            if not missing:
                break
    return keys


def _recognise(found: FoundFile) -> TextFile:
    """Look at the beginning of a file."""
    file = TextFile(found.path, found.format, find_encoding(found.path))
    with open_text(file.path, file.layers) as handle:
        if found.format in DELIMITERS:
            return replace(file, header=read_header(handle, DELIMITERS[found.format]))
        if found.format is Format.JSON and not is_array(handle):
            return replace(file, format=Format.JSONL)
    return file


def scan(file: TextFile, name: str, *, stride: int, limit: int | None, known: InputFile | None = None) -> Scan:
    """Count the rows up to `limit`, hash the bytes that hold them, and mark the rows where reading can begin.

    Every `stride`-th row is marked; of a file that was `known` with fewer rows, the rows that were marked then, and
    every `stride`-th of the others.
    """
    starts = {row for row, _, _ in known.marks} if known else set()
    num_known = known.num_rows if known else 0
    digest = PrefixDigest(num_known)
    marks: list[tuple[int, int, int]] = []
    num_rows = 0
    with as_input_error(name), open_text(file.path, file.layers) as handle:
        for each in _split(handle, file, digest=digest):
            if num_rows in starts or (num_rows >= num_known and (num_rows - num_known) % stride == 0):
                marks.append((num_rows, each.offset, each.number - 1))
            digest.end_row(num_rows)
            num_rows += 1
            if num_rows == limit:
                break
    has_known = known is None or known.identity in digest.prefixes()
    return Scan(num_rows, digest.identity, tuple(marks), has_known)


def read_rows(file: InputFile, start: int, stop: int, *, principal_names: Sequence[str]) -> Iterator[Row]:
    """Yield rows [start, stop) of a file, reading from the last mark before `start`."""
    for line in _lines_from_mark(file, start, stop):
        place = f"{_unit(file)} {line.number} of {file.name}"
        fallback_id = f"{file.name}:{line.number}"
        try:
            record = _record(line.data, file.format)
        except RowError as fault:
            given = given_text(line.data) if isinstance(line.data, (bytes, dict)) else None
            row = Row(row_id=fallback_id, error=f"{place} {fault}", given=given)
        else:
            row = make_row(record, file.columns, row_id=fallback_id, place=place, principal_names=principal_names)
        yield replace(row, file=file.name, number=line.number)


def read_values(file: InputFile, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yield the values of rows [start, stop) by column, as they are; none of a row that cannot be read."""
    for line in _lines_from_mark(file, start, stop):
        try:
            yield _parse(line.data)
        except RowError:
            yield {}


def read_ids(file: InputFile) -> Iterator[FoundId]:
    """Yield the id of every row, as `read_rows` would read it."""
    assert file.columns.id is not None
    for line in _lines_from_mark(file, 0, file.num_rows):
        place, position = f"{_unit(file)} {line.number} of {file.name}", f"{file.name}:{line.number}"
        try:
            yield FoundId(read_id(_record(line.data, file.format).get(file.columns.id)), position, place)
        except RowError:
            yield FoundId(None, position, place, is_broken=True)


def parse_line(data: bytes) -> dict[str, Any]:
    """Parse one line. Raises RowError: its message goes on from "line 17 of x.jsonl"."""
    if len(data) >= LINE_LIMIT_BYTES:
        raise RowError(f"is longer than {LINE_LIMIT_BYTES // 2**20} MiB")
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise RowError("is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise RowError(f"is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError:
        raise RowError("is not usable: it holds a number with too many digits") from None
    except RecursionError:
        raise RowError("is not usable: it is nested too deeply") from None
    if not isinstance(record, dict):
        raise RowError("is not a JSON object")
    return record


def _is_batch_request(record: dict[str, Any]) -> bool:
    """Whether it is a request of chat, or of another kind that is read or refused as one."""
    return "custom_id" in record and isinstance(record.get("body"), dict)


def _unit(file: InputFile) -> str:
    return "element" if file.format is Format.JSON else "line"


def _parse(data: bytes | dict[str, Any] | RowError) -> dict[str, Any]:
    if isinstance(data, RowError):
        raise data
    return parse_line(data) if isinstance(data, bytes) else data


def _record(data: bytes | dict[str, Any] | RowError, format_: Format) -> dict[str, Any]:
    record = _parse(data)
    if format_ is not Format.BATCH:
        return record
    if not _is_batch_request(record):
        raise RowError("is not a batch request with custom_id and body.messages")
    try:
        body = as_chat_body(record["body"]) if is_responses_request(record) else record["body"]
    except RowError as fault:  # its id is known
        return {**record, "messages": Unreadable(f"cannot be read: {fault}")}
    if "messages" not in body:
        url = record.get("url")
        named = f"it is a request of {quote(url)}" if isinstance(url, str) else "there is no body.messages"
        fault_text = f"cannot be read: {named}; only requests of /v1/chat/completions and /v1/responses are read"
        return {**record, "messages": Unreadable(fault_text)}
    return {**record, "messages": body["messages"], "body": body}


def _lines_from_mark(file: InputFile, start: int, stop: int) -> Iterator[TextRecord]:
    if start >= stop:
        return
    row, offset, number = file.marks[bisect_right(file.marks, start, key=lambda mark: mark[0]) - 1]
    skip, wanted = start - row, stop - start
    text = TextFile(file.path, file.format, file.layers, file.header)
    with as_input_error(file.name), open_text(file.path, file.layers, offset) as handle:
        for index, each in enumerate(_split(handle, text, offset=offset, number=number)):
            if index >= skip:
                yield each
            if index + 1 == skip + wanted:
                return
    raise ConfigurationError(f"{file.name} is shorter than when the run was planned")


def _split(
    handle: BinaryIO, file: TextFile, *, offset: int = 0, number: int = 0, digest: Any = None
) -> Iterator[TextRecord]:
    """The records of a file from `offset` on, before which there are `number` lines or elements.

    `digest` is fed with what was read, before a record is yielded.
    """
    if file.format in DELIMITERS:
        header = file.header if offset else ()
        return split_rows(handle, DELIMITERS[file.format], header=header, offset=offset, number=number, digest=digest)
    if file.format is Format.JSON:
        return split_items(handle, offset=offset, number=number, digest=digest)
    return _split_lines(handle, offset=offset, number=number, digest=digest)


def _split_lines(handle: BinaryIO, *, offset: int, number: int, digest: Any) -> Iterator[TextRecord]:
    while piece := handle.readline(LINE_LIMIT_BYTES):
        begin, data = offset, piece
        offset += len(piece)
        number += 1
        if digest is not None:
            digest.update(piece)
        while len(piece) == LINE_LIMIT_BYTES and not piece.endswith(b"\n"):
            piece = handle.readline(LINE_LIMIT_BYTES)
            offset += len(piece)
            if digest is not None:
                digest.update(piece)
        if len(data) < LINE_LIMIT_BYTES:
            data = without_mark(data, begin).rstrip()
        if data:
            yield TextRecord(number, begin, data)
