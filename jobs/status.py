"""`cage status`: how far a run is, from its files alone."""

from __future__ import annotations

from datetime import UTC, datetime

from jobs.text import printable
from pipeline.storage.run import Run


def run_status(path: str) -> None:
    print(describe_status(Run.open(path)))


def describe_status(run: Run) -> str:
    """A few lines: state, counts, reasons of rejection, where the files are and how to read them."""
    status = run.status()
    lines = [
        f"{status.path}: {'complete' if status.is_complete else 'not complete; the same command continues it'}",
        f"  shards    {status.shards_done:,} of {status.num_shards:,}",
        f"  answers   {status.rows_aligned:,} aligned, {status.rows_rejected:,} rejected, of {status.num_rows:,}",
        f"  tokens    {status.tokens:,}",
    ]
    if status.last_commit_at is not None:
        lines.append(f"  last      {datetime.fromtimestamp(status.last_commit_at, UTC):%Y-%m-%d %H:%M:%S} UTC")
    for reason, count in sorted(status.errors.items(), key=lambda item: -item[1])[:10]:
        lines.append(f"  rejected  {count:,} x {printable(reason)}")
    if status.rows_rejected:
        lines.append(f"  rejected rows are in {run.store.path.rstrip('/')}/_rejected")
    if status.shards_done:
        lines.append(f"  look      cage inspect {status.path} ROW_ID")
        lines.append(
            f'  load      datasets.load_dataset("parquet", data_files="{run.store.path.rstrip("/")}/part-*.parquet")'
        )
    return "\n".join(lines)
