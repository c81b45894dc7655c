"""CSV and TSV files as records: a header, then one record per row, which may go over several lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.errors import RowError
from pipeline.inputs.text_records import LIMIT_BYTES, LIMIT_TEXT, TextRecord, without_mark
from pipeline.quoting import one_line, quote

DELIMITERS = {"csv": ",", "tsv": "\t"}


def split_rows(
    handle: BinaryIO,
    delimiter: str,
    *,
    header: tuple[str, ...] = (),
    offset: int = 0,
    number: int = 0,
    digest: Any = None,
) -> Iterator[TextRecord]:
    """Yield the records after the header; an empty field is None.

    Args:
        handle: stands at `offset`, the beginning of a record.
        header: the names of the columns; empty: the first record has them.
        number: lines before `offset`.
        digest: is fed with what was read up to the end of the record that is yielded.
    """
    lines = _Lines(handle, offset, number, digest)
    rows = _reader(lines, delimiter)
    while True:
        begin, before = lines.offset, lines.number
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            rows = _reader(lines, delimiter)
            if not header:
                raise ValueError(f"the header cannot be read: {one_line(error)}") from None
            yield TextRecord(before + 1, begin, RowError(f"is not valid: {_reason(error)}"))
            continue
        if not any(field.strip() for field in fields):
            continue
        if header:
            yield TextRecord(before + 1, begin, _record(header, fields))
        else:
            header = tuple(fields)


def read_header(handle: BinaryIO, delimiter: str) -> tuple[str, ...]:
    """The names in the first row; none in an empty file.

    Raises:
        ValueError: it cannot be read, or a name is there twice.
    """
    lines = _Lines(handle, 0, 0, None)
    try:
        fields: list[str] = next((fields for fields in _reader(lines, delimiter) if any(fields)), [])
        names = tuple(field.encode("utf-8", "surrogateescape").decode("utf-8") for field in fields)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"its header cannot be read: {one_line(error)}") from None
    repeated = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if repeated is not None:
        raise ValueError(f"its header has the column {quote(repeated)} twice")
    return names


class _Lines:
    """The lines of a file as text, with the place that has been read to."""

    def __init__(self, handle: BinaryIO, offset: int, number: int, digest: Any) -> None:
        self._handle, self._digest = handle, digest
        self.offset, self.number = offset, number

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        piece = self._handle.readline(LIMIT_BYTES)
        if not piece:
            raise StopIteration
        if self._digest is not None:
            self._digest.update(piece)
        text = without_mark(piece, self.offset)
        self.offset += len(piece)
        self.number += 1
        # Bytes that are no UTF-8 become surrogates, and an error of the row that they belong to.
        return text.decode("utf-8", errors="surrogateescape")


def _reader(lines: _Lines, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(LIMIT_BYTES)  # of the process; the default of 128 KiB is less than a long prompt
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _record(header: tuple[str, ...], fields: list[str]) -> dict[str, Any] | RowError:
    if len(fields) != len(header):
        return RowError(f"has {len(fields)} fields, but the header has {len(header)}")
    try:
        values = [field.encode("utf-8", "surrogateescape").decode("utf-8") or None for field in fields]
    except UnicodeDecodeError:
        return RowError("is not valid UTF-8")
    return dict(zip(header, values, strict=True))


def _reason(error: csv.Error) -> str:
    if "field larger" in str(error):
        return f"a field is longer than {LIMIT_TEXT}"
    return "a quote is not closed" if "end of data" in str(error) else one_line(error)
