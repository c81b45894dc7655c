"""`cage status`: how far a run is, from its files alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from jobs.commands.text import printable, shown_path
from pipeline.monitoring.progress import duration
from pipeline.storage.commits import CommitRecord
from pipeline.storage.pace import Pace, measure_pace
from pipeline.storage.run import Run
from pipeline.storage.run_status import RunStatus

SHOWN_REASONS = 10
LAST_SHARDS = 16  # whose commits give the pace
SHOWN_REPLICAS, SHOWN_SLOW = 8, 3
SLOW, SLOW_S = 3.0, 10.0  # a shard is slow that took so many times the median, and so long
ENOUGH_SHARDS = 5  # before one of them is called slow


def run_status(path: str, *, as_json: bool = False, every_s: float | None = None) -> None:
    """Print the state of a run, once or `every_s` seconds until it is complete."""
    show = _as_json if as_json else describe_status
    run = Run.open(path)
    print(show(run), flush=True)
    while every_s is not None and not run.is_complete:
        time.sleep(every_s)
        run = Run.open(path)
        print(("" if as_json else "\n") + show(run), flush=True)


def status_fields(run: Run) -> dict[str, Any]:
    """What a log says of a run: counts, and nothing of its rows."""
    status = run.status()
    return {
        "path": status.path,
        "is_complete": status.is_complete,
        "shards": status.shards_done,
        "num_shards": status.num_shards,
        "aligned": status.rows_aligned,
        "failed": status.rows_failed,
        "num_rows": status.num_rows,
        "tokens": status.tokens,
    }


def _as_json(run: Run) -> str:
    """Everything that `RunStatus` has, and the pace of the last shards."""
    records = run.committed()
    status = run.status(records)
    tree = {name: value for name, value in asdict(status).items() if name not in ("failures", "recoveries")}
    pace = _pace(records.values(), status)
    tree |= {
        "failures": status.errors,
        "recoveries": asdict(status.recoveries),
        "tokens_per_second": None if pace is None else pace.tokens_per_second,
        "seconds_left": None if pace is None else pace.seconds_for(_answers_left(status)),
        "tokens_per_second_by_replica": replica_paces(records.values()),
        "slow_shards": slow_shards(records.values()),
    }
    return json.dumps(tree, ensure_ascii=False, indent=1)


def _answers_left(status: RunStatus) -> int:
    return status.num_rows - status.rows_aligned - status.rows_failed


def _pace(records: Iterable[CommitRecord], status: RunStatus) -> Pace | None:
    """That of the last shards, over all replicas; None where nothing is left to do."""
    return None if status.shards_done >= status.num_shards else measure_pace(records, newest=LAST_SHARDS)


def replica_paces(records: Iterable[CommitRecord]) -> dict[str, float]:
    """Tokens per second of each replica's process over its last shards, the one that committed last first."""
    by_host: dict[str, list[CommitRecord]] = {}
    for record in sorted(records, key=lambda each: each.committed_at):
        by_host.setdefault(record.host, []).append(record)
    paces = {}
    for host, found in sorted(by_host.items(), key=lambda item: -item[1][-1].committed_at):
        last = found[-LAST_SHARDS:]
        seconds = last[-1].committed_at - last[0].committed_at
        if seconds > 0:
            paces[host] = sum(record.tokens for record in last[1:]) / seconds
    return paces


def slow_shards(records: Iterable[CommitRecord]) -> dict[int, float]:
    """The seconds of shards that took much longer than the others, the slowest first."""
    seconds = {record.shard: record.seconds for record in records}
    if len(seconds) < ENOUGH_SHARDS:
        return {}
    least = max(SLOW_S, SLOW * median(seconds.values()))
    return {shard: took for shard, took in sorted(seconds.items(), key=lambda item: -item[1]) if took >= least}


def describe_status(run: Run) -> str:
    """A few lines: state, counts, reasons of failures, where the files are and how to read them."""
    records = run.committed()
    status = run.status(records)
    path = shown_path(status.path)
    lines = [
        f"{path}: {'complete' if status.is_complete else 'not complete; the same command continues it'}",
        f"  shards    {status.shards_done:,} of {status.num_shards:,}",
        f"  answers   {status.rows_aligned:,} aligned, {status.rows_failed:,} failed, of {status.num_rows:,}",
        f"  tokens    {status.tokens:,}",
    ]
    if status.accepted:
        lines.append(f"  drafts    {status.accepted:,} tokens were proposed and drawn, and took no pass of their own")
    if len(status.prompts) > 1:
        *before, now = (f"{number:,}" for number in status.prompts)
        lines.append(f"  extended  from {', '.join(before)} to {now} prompts")
    if status.revised_shards:
        newest = max(run.revisions().values())
        lines.append(
            f"  revised   {status.revised_shards:,} shards: {status.reruns:,} rows were run again (newest revision "
            f"{newest}); the files before are in {path}/_superseded"
        )
    if (pace := _pace(records.values(), status)) is not None:
        lines.append(
            f"  pace      {pace.tokens_per_second:,.1f} tokens/s over the last shards; at that pace "
            f"{duration(pace.seconds_for(_answers_left(status)))} are left"
        )
        paces = replica_paces(run.committed().values())
        if len(paces) > 1:
            shown = ", ".join(f"{host} {pace:,.1f}" for host, pace in list(paces.items())[:SHOWN_REPLICAS])
            lines.append(f"  replicas  {printable(shown)} tokens/s" + ", ..." * (len(paces) > SHOWN_REPLICAS))
    if slow := slow_shards(run.committed().values()):
        shown = ", ".join(f"{shard} ({duration(took)})" for shard, took in list(slow.items())[:SHOWN_SLOW])
        lines.append(f"  slow      shards {shown}" + ", ..." * (len(slow) > SHOWN_SLOW))
    if status.last_commit_at is not None:
        lines.append(f"  last      {datetime.fromtimestamp(status.last_commit_at, UTC):%Y-%m-%d %H:%M:%S} UTC")
    repeats = f"attempts of shards lost {status.attempts_lost:,}" if status.attempts_lost else ""
    if overcome := ", ".join(filter(None, [status.recoveries.describe(), repeats])):
        lines.append(f"  overcome  {overcome}")
    lines += [f"  warning   {printable(line)}" for line in status.silent.values()]
    if status.unsteered:
        lines.append(f"  warning   the weights of {status.unsteered:,} answers are all 0: no principal steered them")
    for kind, failures in list(status.failures.items())[:SHOWN_REASONS]:
        lines.append(f"  failed    {printable(failures.describe(kind))}")
    if status.failed_folders:
        lines.append("  failed rows are in " + ", ".join(f"{path}/{folder}" for folder in status.failed_folders))
    if status.rows_aligned:
        lines.append(f"  look      cage inspect {path} {printable(_some_row_id(run))}")
        lines.append(f'  load      datasets.load_dataset("parquet", data_files="{path}/part-*.parquet")')
        if run.plan.has_response and run.plan.principal_names:
            lines.append(f'  pairs     datasets.load_dataset("parquet", data_files="{path}/_pairs/part-*.parquet")')
    return "\n".join(lines)


def _some_row_id(run: Run) -> str:
    """The first aligned row that is committed."""
    for record in run.committed().values():
        for name in record.sha256_by_file:
            if name.startswith("part-") and record.rows:
                # not pq.read_table: it imports pandas, which takes longer than the whole command
                with run.store.open(name) as handle, pq.ParquetFile(handle) as file:
                    return str(next(file.iter_batches(batch_size=1, columns=["row_id"]))["row_id"][0].as_py())
    return "ROW_ID"
