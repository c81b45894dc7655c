"""JSON arrays as records: each element is parsed by itself, so a bad one costs no other, nor the memory of all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.inputs.text_records import LIMIT_BYTES, LIMIT_TEXT, TextRecord, without_mark

CHUNK_BYTES = 2**20
# What decides where an element ends: whole strings, whose brackets count for nothing, and brackets and commas.
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]|"', re.DOTALL)
DEPTH_CHANGE = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
SPACE = b" \t\r\n"


def is_array(handle: BinaryIO) -> bool:
    """Whether the first character of a JSON text opens an array."""
    offset = 0
    while chunk := handle.read(CHUNK_BYTES):
        text = without_mark(chunk, offset).lstrip(SPACE)
        if text:
            return text.startswith(b"[")
        offset += len(chunk)
    return False


def split_items(handle: BinaryIO, *, offset: int = 0, number: int = 0, digest: Any = None) -> Iterator[TextRecord]:
    """Yield the elements of the array, numbered from 1.

    Args:
        handle: stands at `offset`: 0, or the beginning of an element.
        number: elements before `offset`.
        digest: is fed with each element before it is yielded.

    Raises:
        ValueError: the array is not closed, or something follows it.
    """
    # `buffer` begins at `offset`, the element at `begin`; all before `at` has been looked at.
    buffer, begin, at, depth = b"", 0, 0, 0 if offset == 0 else 1
    while True:
        token = TOKEN.search(buffer, at)
        if token is None or token[0] == b'"':  # the string goes on in the next chunk
            at = len(buffer) if token is None else token.start()
            buffer, offset, at, begin = buffer[begin:], offset + begin, at - begin, 0
            if len(buffer) > 2 * LIMIT_BYTES:
                raise ValueError(f"element {number + 1} is longer than {LIMIT_TEXT}")
            chunk = handle.read(max(CHUNK_BYTES, len(buffer)))  # doubling: a long string is searched again each time
            if not chunk:
                raise ValueError(f"the array is not closed; it ends within element {number + 1}")
            buffer += chunk
            continue
        at, symbol = token.end(), token[0]
        depth += DEPTH_CHANGE.get(symbol, 0)
        if depth == 1 and symbol == b"[":
            begin = at
        is_end = depth == 0
        if not is_end and not (depth == 1 and symbol == b","):
            continue
        text = buffer[begin : at - 1]
        data = text.strip(SPACE)
        if digest is not None:
            digest.update(data + b"\n")
        if data or not is_end or number:
            number += 1
            yield TextRecord(number, offset + begin + len(text) - len(text.lstrip(SPACE)), data)
        begin = at
        if is_end:
            if (buffer[at:] + handle.read(CHUNK_BYTES)).strip(SPACE):
                raise ValueError("something follows the array")
            return
