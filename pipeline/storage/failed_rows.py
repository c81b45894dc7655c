"""The failed rows of a run as an input: what `cage retry` decodes again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigurationError
from pipeline.inputs.column_choice import KWARGS
from pipeline.inputs.files import Format
from pipeline.quoting import quote
from pipeline.storage.run import OWN_INPUT, Run
from pipeline.storage.shard_files import as_damaged_file, is_of_failed_rows
from pipeline.stores.store import Store, open_store

INPUT, EARLIER_INPUT = f"{OWN_INPUT}/failed.jsonl", f"{OWN_INPUT}/rejected.jsonl"
SHOWN_IDS = 5


@dataclass(frozen=True, slots=True)
class FailedRows:
    """The input of a run of failed rows.

    Args:
        path: where that run belongs: beside the first one.
        input: the address of its rows: JSONL with id, messages, tools, weights and response, or batch requests.
        is_batch: whether they are batch requests, which have parameters of their own.
    """

    path: str
    input: str
    is_batch: bool


def write_failed_rows(run: Run, only: Collection[str] = ()) -> FailedRows:
    """Write the failed rows of a finished run as an input beside it; writing again changes nothing.

    Args:
        run: the run, which is not changed.
        only: ids of failed rows; empty: all that can be tried again. Each choice has a place of its own.

    Raises:
        ConfigurationError: the run is not finished, or has no such row that could be tried again.
    """
    path = run.store.path
    if not run.is_complete:
        raise ConfigurationError(f"{path} is not complete; the command that began it continues it")
    rows = {row.get("id") or row["custom_id"]: row for row in find_failed_rows(run)}
    if unknown := [row_id for row_id in only if row_id not in rows]:
        shown = ", ".join(quote(row_id) for row_id in unknown[:SHOWN_IDS])
        raise ConfigurationError(f"{path} has no failed row that can be tried again of the id {shown}")
    if not rows:
        raise ConfigurationError(f"{path} has no failed row that can be tried again")
    wanted = set(only or rows)
    chosen = [row for row_id, row in rows.items() if row_id in wanted]
    target = open_store(f"{path.rstrip('/')}-retry{_suffix(only)}")
    name = EARLIER_INPUT if target.read(EARLIER_INPUT) is not None else INPUT
    target.create(name, b"".join(json.dumps(row).encode() + b"\n" for row in chosen))
    return FailedRows(target.path, target.url(name), is_batch="custom_id" in chosen[0])


def find_failed_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Readable rows without any answer, in the order of the run; batch requests where the run has some.

    Raises:
        ConfigurationError: the batch requests of the run, which have the parameters of their rows, are gone.
    """
    is_batch = any(file.format is Format.BATCH for file in run.plan.files)
    has_kwargs = any(file.columns.template_kwargs is not None for file in run.plan.files)
    for record in run.committed().values():
        if not record.failed:
            continue
        failed: list[dict[str, Any]] = []
        answered: Counter[str] = Counter()
        for name in record.sha256_by_file:
            if is_of_failed_rows(name):
                failed += _read(run.store, name).to_pylist()
            else:
                answered.update(_read(run.store, name, ["row_id"])["row_id"].to_pylist())
        again = {row["row_id"]: row for row in failed if _was_read(row) and row["row_id"] not in answered}
        parameters = _parameters(run, record.shard) if (is_batch or has_kwargs) and again else {}
        for row_id, row in again.items():
            read = {"weights": row.get("weights"), "response": row.get("original_response")}
            prompt = {"messages": row["prompt"], **({"tools": row["tools"]} if run.plan.has_tools else {})}
            if is_batch:
                yield {"custom_id": row_id, "body": {**prompt, **parameters.get(row_id, {})}, **read}
            else:
                kwargs = {KWARGS: parameters[row_id][KWARGS]} if has_kwargs else {}
                yield {"id": row_id, **prompt, **read, **kwargs}


def _was_read(row: dict[str, Any]) -> bool:
    """Whether a failed row could be read; of an earlier version, a row that could not be has no prompt."""
    return bool(row["prompt"]) and row.get("given") is None


def _parameters(run: Run, shard: int) -> dict[str, dict[str, Any]]:
    """What the requests of a shard ask for themselves, by row id; the output does not have it."""
    return {
        row.row_id: {
            "max_completion_tokens": row.max_new_tokens,
            "seed": row.seed,
            "stop": row.stop,
            KWARGS: dict(row.template_kwargs) or None,
            **row.wished_kwargs,
        }
        for row in run.plan.read_shard(shard)
    }


def _read(store: Store, name: str, columns: list[str] | None = None) -> pa.Table:
    with as_damaged_file(store.url(name)), store.open(name) as handle, pq.ParquetFile(handle) as file:
        table: pa.Table = file.read(columns=columns)
        return table


def _suffix(only: Collection[str]) -> str:
    return f"-{hashlib.sha256(json.dumps(sorted(only)).encode()).hexdigest()[:8]}" if only else ""
