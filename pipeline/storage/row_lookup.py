"""Find the records of one row in a stored file, reading as little of it as possible."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from pipeline.storage.shard_files import as_damaged_file
from pipeline.stores.store import Store


def find_row(store: Store, name: str, row_id: str) -> list[dict[str, Any]]:
    """Return the records of a row in the file `name`: every variant and sample, in the order of the file.

    Looks at the file's statistics, then at its row ids; the other columns are read only where the row is there.

    Raises:
        StorageError: the file is missing or damaged.
    """
    with as_damaged_file(store.url(name)), store.open(name) as handle, pq.ParquetFile(handle) as file:
        if file.metadata.num_rows == 0 or not _may_hold(file.metadata, row_id):
            return []
        ids = file.read(columns=["row_id"]).column("row_id").to_pylist()
        wanted = [index for index, found in enumerate(ids) if found == row_id]
        if not wanted:
            return []
        table = file.read()
        # Slices, because Table.take would load pyarrow.compute and pandas, which takes longer than the search.
        return [row for index in wanted for row in table.slice(index, 1).to_pylist()]


def _may_hold(metadata: pq.FileMetaData, row_id: str) -> bool:
    """Whether a file's statistics allow that it holds the row; row_id is its first column."""
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(0).statistics
        if statistics is None or not statistics.has_min_max or statistics.min <= row_id <= statistics.max:
            return True
    return False
