"""What the readers of JSON lines, JSON arrays, CSV and TSV give: one record after the other, each with its place."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.errors import RowError

LIMIT_BYTES = 64 * 2**20  # of one record
LIMIT_TEXT = f"{LIMIT_BYTES // 2**20} MiB"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextRecord(NamedTuple):
    """A record that is not blank.

    Args:
        number: its line or element, from 1.
        offset: of its first byte.
        data: JSON text, cut at the limit; or the values by column; or why there are none.
    """

    number: int
    offset: int
    data: bytes | dict[str, Any] | RowError


def without_mark(data: bytes, offset: int) -> bytes:
    """Bytes that were read at `offset`, without the byte order mark of the file."""
    return data.removeprefix(BYTE_ORDER_MARK) if offset == 0 else data
