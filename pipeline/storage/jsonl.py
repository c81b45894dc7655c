"""JSON lines: one pass that counts, hashes and marks; then rows from any mark."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from pipeline.errors import ConfigurationError, RowError
from pipeline.records import Row
from pipeline.storage.input_files import Format, InputFile, as_input_error, open_bytes
from pipeline.storage.rows import FoundId, make_row, read_id

LINE_LIMIT_BYTES = 64 * 2**20
PEEK_ROWS = 100
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line that is not blank. `number` is 1-based, `offset` its first byte; `data` is cut at the limit."""

    number: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over a file finds: see the fields of `InputFile` with the same names."""

    num_rows: int
    identity: str
    marks: tuple[tuple[int, int], ...]


def peek(path: str, name: str) -> tuple[Format, tuple[str, ...]]:
    """Distinguish batch requests from plain JSONL; collect the keys of the first objects in order of appearance."""
    keys: dict[str, None] = {}
    format_, num_objects = Format.JSONL, 0
    with as_input_error(name), open_bytes(path) as handle:
        for line in _lines(handle):
            try:
                record = parse_line(line.data)
            except RowError:
                continue
            if num_objects == 0 and _is_batch_request(record):
                format_ = Format.BATCH
            keys.update(dict.fromkeys(record))
            num_objects += 1
            if num_objects == PEEK_ROWS:
                break
    return format_, tuple(keys)


def scan(path: str, name: str, *, stride: int, limit: int | None) -> Scan:
    """Count the rows up to `limit`, hash the bytes that hold them, and mark every `stride`-th row."""
    digest = hashlib.sha256()
    marks: list[tuple[int, int]] = []
    num_rows = 0
    with as_input_error(name), open_bytes(path) as handle:
        for line in _lines(handle, digest=digest):
            if num_rows % stride == 0:
                marks.append((line.offset, line.number - 1))
            num_rows += 1
            if num_rows == limit:
                break
    return Scan(num_rows, f"sha256:{digest.hexdigest()}", tuple(marks))


def read_rows(
    file: InputFile, start: int, stop: int, *, stride: int, principal_names: Sequence[str]
) -> Iterator[Row]:
    """Yield rows [start, stop) of a file, reading from the last mark before `start`."""
    for line in _lines_from_mark(file, start, stop, stride=stride):
        place = f"line {line.number} of {file.name}"
        fallback_id = f"{file.name}:{line.number}"
        try:
            record = _record(line.data, file.format)
        except RowError as fault:
            yield Row(row_id=fallback_id, error=f"{place} {fault}")
            continue
        yield make_row(record, file.columns, row_id=fallback_id, place=place, principal_names=principal_names)


def read_ids(file: InputFile) -> Iterator[FoundId]:
    """Yield the id of every row, as `read_rows` would read it."""
    assert file.columns.id is not None
    for line in _lines_from_mark(file, 0, file.num_rows, stride=1):
        place, position = f"line {line.number} of {file.name}", f"{file.name}:{line.number}"
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
    body = record.get("body")
    return "custom_id" in record and isinstance(body, dict) and "messages" in body


def _record(data: bytes, format_: Format) -> dict[str, Any]:
    record = parse_line(data)
    if format_ is not Format.BATCH:
        return record
    if not _is_batch_request(record):
        raise RowError("is not a batch request with custom_id and body.messages")
    return {**record, "messages": record["body"]["messages"]}


def _lines_from_mark(file: InputFile, start: int, stop: int, *, stride: int) -> Iterator[Line]:
    if start >= stop:
        return
    mark = start // stride if start else 0
    offset, line_number = file.marks[mark]
    skip, wanted = start - mark * stride, stop - start
    with as_input_error(file.name), open_bytes(file.path) as handle:
        handle.seek(offset)
        for index, line in enumerate(_lines(handle, offset=offset, number=line_number)):
            if index >= skip:
                yield line
            if index + 1 == skip + wanted:
                return
    raise ConfigurationError(f"{file.name} is shorter than when the run was planned")


def _lines(handle: BinaryIO, *, offset: int = 0, number: int = 0, digest: Any = None) -> Iterator[Line]:
    """Yield the lines that are not blank. `digest` is fed with everything read, before the line is yielded."""
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
            data = data.removeprefix(BYTE_ORDER_MARK) if begin == 0 else data
            data = data.rstrip()
        if data:
            yield Line(number, begin, data)
