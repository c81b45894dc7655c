"""`cage retry`: try the rejected rows of a finished run again, as a separate run beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from jobs.commands.relabel import run_config
from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.storage.run import Run
from pipeline.storage.stores import open_store

INPUT = "_input/rejected.jsonl"


def run_retry(path: str, overrides: list[str], *, is_verbose: bool) -> None:
    """Make, or continue, the run of the rejected rows and say what was written."""
    run_config(retry_config(path, overrides), is_verbose=is_verbose)


def retry_config(path: str, overrides: list[str]) -> Config:
    """Write the rejected rows of the run at `path` as an input, and configure a run of them.

    The new run is in `<path>-retry`. It has the settings of the first except for overrides, so a row's draws are the
    same. The first run is not changed. A row that could not be read has no prompt to try again.

    Raises:
        ConfigurationError: the run is not finished, or has no row to try again.
    """
    run = Run.open(path)
    if not run.is_complete:
        raise ConfigurationError(f"{path} is not complete; the command that began it continues it")
    rows = list(_rows_to_retry(run))
    if not rows:
        raise ConfigurationError(f"{path} has no rejected row that can be tried again")
    target = open_store(f"{run.store.path.rstrip('/')}-retry")
    target.create(INPUT, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    config = {name: run.plan.config[name] for name in Config.model_fields}  # what other jobs add decodes nothing
    tree: dict[str, Any] = json.loads(json.dumps(config))
    tree["input"] = {"path": target.url(INPUT), "id": "id", "messages": "messages"}
    tree["input"]["last_assistant"] = run.plan.config["input"].get("last_assistant")
    if run.plan.principal_names and not tree["grid"]["weights"]:
        tree["input"]["weights"] = "weights"
    if run.plan.has_response:
        tree["input"]["response"] = "response"
    tree["output"]["path"] = target.path
    return parse_config(tree, overrides, source=f"the settings of {path}")


def _rows_to_retry(run: Run) -> Iterator[dict[str, Any]]:
    """Readable rows without any aligned sample, in the order of the run."""
    for record in run.committed().values():
        if not record.rejected:
            continue
        tables = {name: run.store.open(name) for name in record.sha256_by_file}
        rejected, aligned = [], Counter[str]()
        for name, file in tables.items():
            with file:
                table = pq.read_table(file)
            if name.startswith("part-"):
                aligned.update(table["row_id"].to_pylist())
            else:
                rejected += table.to_pylist()
        for row in {row["row_id"]: row for row in rejected}.values():
            if row["prompt"] and row["row_id"] not in aligned:
                yield {
                    "id": row["row_id"],
                    "messages": row["prompt"],
                    "weights": row.get("weights"),
                    "response": row.get("original_response"),
                }
