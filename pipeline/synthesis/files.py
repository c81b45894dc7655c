"""The data files of one split: rows in, files with equal numbers of rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.storage.commits import sha256
from pipeline.storage.tables import write_table_bytes
from pipeline.stores.store import Store

FOLDER = "_dataset/"
BUFFERED_ROWS = 1024


@dataclass(frozen=True, slots=True)
class DataFile:
    """A written file.

    Args:
        name: relative to the data set's folder.
        rows: number of rows.
        sha256: of its bytes.
    """

    name: str
    rows: int
    sha256: str


class SplitFiles:
    """Writes the rows of one split as STEM-00000-of-00003.parquet and so on.

    Call `add` for each row and `end` once.

    Args:
        store: the run's store.
        stem: the beginning of the files' names, such as "sft/train".
        schema: the columns.
        num_rows: how many rows will be added; the names of the files say how many files there are.
        rows_per_file: most rows of one file.
    """

    def __init__(self, store: Store, stem: str, schema: pa.Schema, *, num_rows: int, rows_per_file: int) -> None:
        self._store = store
        self._stem = stem
        self._schema = schema
        self._rows_per_file = rows_per_file
        self._num_files = -(-num_rows // rows_per_file)
        self._rows: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []  # of at most BUFFERED_ROWS rows each: far smaller than as Python objects
        self._num_waiting = 0
        self._written: list[DataFile] = []

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; writes a file when it is full."""
        self._rows.append(row)
        self._num_waiting += 1
        if len(self._rows) == BUFFERED_ROWS:
            self._pack()
        if self._num_waiting == self._rows_per_file:
            self._write()

    def end(self) -> Sequence[DataFile]:
        """Write the last file; returns all files."""
        if self._num_waiting:
            self._write()
        assert len(self._written) == self._num_files
        return self._written

    def _pack(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def _write(self) -> None:
        self._pack()
        data = write_table_bytes(pa.concat_tables(self._tables))
        name = f"{self._stem}-{len(self._written):05d}-of-{self._num_files:05d}.parquet"
        self._store.put(FOLDER + name, data)
        self._written.append(DataFile(name, self._num_waiting, sha256(data)))
        self._tables = []
        self._num_waiting = 0
