"""The failed rows of a run: which of them can be tried again, and as an input where the run's own is gone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.kept import from_text
from pipeline.storage.names import OWN_INPUT, is_of_failed_rows
from pipeline.storage.run import Run
from pipeline.storage.shard_files import as_damaged_file
from pipeline.storage.tables import MESSAGES, MESSAGES_WITH_TOOLS, write_table_bytes
from pipeline.stores.store import Store

INPUT = f"{OWN_INPUT}/failed.parquet"
# Names that no kept column has, because the output has columns of these names itself.
ID, CONVERSATION, TOOLS, WEIGHTS, RESPONSE = "row_id", "messages", "tools", "weights", "original_response"


def failed_of(run: Run) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield by shard the rows that could be read and have no answer, each once, as the run has stored them."""
    for record in run.committed().values():
        if not record.failed:
            continue
        failed: list[dict[str, Any]] = []
        answered: set[str] = set()
        for name in record.sha256_by_file:
            if is_of_failed_rows(name):
                failed += read_stored(run.store, name).to_pylist()
            else:
                answered.update(read_stored(run.store, name, ["row_id"])["row_id"].to_pylist())
        again = {row["row_id"]: row for row in failed if _was_read(row) and row["row_id"] not in answered}
        if again:
            yield record.shard, list(again.values())


def write_failed_rows(run: Run, ids: Collection[str], store: Store) -> str:
    """Write failed rows as a Parquet input into another store, and return its address; writing again changes nothing.

    It has the columns named above, and the kept ones of the run.
    """
    rows = [row for _, of_shard in failed_of(run) for row in of_shard if row["row_id"] in ids]
    kept = from_text(run.plan.kept)
    schema = pa.schema(
        [
            (ID, pa.string()),
            (CONVERSATION, MESSAGES_WITH_TOOLS if run.plan.has_tools else MESSAGES),
            *([(TOOLS, pa.string())] if run.plan.has_tools else []),
            (WEIGHTS, pa.map_(pa.string(), pa.float64())),
            (RESPONSE, pa.string()),
            *(kept or ()),
        ]
    )
    given = [
        {
            **{name: row.get(name) for name in schema.names},
            CONVERSATION: row["prompt"],
            WEIGHTS: list((row.get("weights") or {}).items()),
        }
        for row in rows
    ]
    store.create(INPUT, write_table_bytes(pa.Table.from_pylist(given, schema=schema)))
    return store.url(INPUT)


def read_stored(store: Store, name: str, columns: list[str] | None = None) -> pa.Table:
    """The table of a run's file, or those of the columns that it has. Raises StorageError."""
    with as_damaged_file(store.url(name)), store.open(name) as handle, pq.ParquetFile(handle) as file:
        there = file.schema_arrow.names
        table: pa.Table = file.read(columns=None if columns is None else [each for each in columns if each in there])
        return table


def _was_read(row: dict[str, Any]) -> bool:
    """Whether a failed row could be read; of an earlier version, a row that could not be has no prompt."""
    return bool(row["prompt"]) and row.get("given") is None
