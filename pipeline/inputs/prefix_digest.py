"""The hash of a text file, which also shows whether the file begins with the whole of a shorter one."""

from __future__ import annotations

import hashlib
from typing import Any


class PrefixDigest:
    """A SHA-256 over the bytes of a text file, as a reader feeds them record by record.

    A shorter file with the first N records ended somewhere between the last byte of its N-th one and the first byte
    of the next: without a line break, with one, or after blank lines. `prefixes` has the hashes of these endings.

    Args:
        num_known: N; 0 where there is no shorter file.
    """

    def __init__(self, num_known: int = 0) -> None:
        self._num_known = num_known
        self._whole = hashlib.sha256()
        self._before = self._whole.copy()  # as it was before the bytes that `_fed` has
        self._fed: list[bytes] | None = [] if num_known == 1 else None
        self._is_past_known = False
        self._prefixes: set[str] = set()

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        self._whole.update(data)
        if self._fed is not None:
            self._fed.append(data)

    def end_row(self, row: int) -> None:
        """Take note that the bytes of a record, and of blank lines before it, were fed."""
        if row == self._num_known:
            self._add_blank_endings()
            self._fed = None
        elif row == self._num_known - 1:
            self._add(self._whole)
            shorter = self._before.copy()
            shorter.update(b"".join(self._fed or ()).rstrip(b"\r\n"))
            self._add(shorter)
            self._is_past_known = True
        if row in (self._num_known - 2, self._num_known - 1):
            self._before, self._fed = self._whole.copy(), []

    @property
    def identity(self) -> str:
        """Of all bytes."""
        return _identity(self._whole)

    def prefixes(self) -> set[str]:
        """The identities that a file with the known records alone may have; none where there are fewer records."""
        if self._is_past_known and self._fed is not None:
            self._add_blank_endings()
        return self._prefixes

    def _add_blank_endings(self) -> None:
        """After each of the blank lines that follow the last known record."""
        ending = self._before.copy()
        for line in b"".join(self._fed or ()).splitlines(keepends=True):
            if line.strip():
                return
            ending.update(line)
            self._add(ending)

    def _add(self, digest: Any) -> None:
        self._prefixes.add(_identity(digest))


def _identity(digest: Any) -> str:
    return f"sha256:{digest.hexdigest()}"
