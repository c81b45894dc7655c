"""`cage retry`: try the failed rows of a finished run again, as a separate run beside it."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from jobs.commands.relabel import run_config
from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.storage.failed_rows import write_failed_rows
from pipeline.storage.run import Run

# Keys of `input` that say where a row's values are. The others say what they mean, and hold for the failed rows too.
WHERE_ROWS_ARE = {
    "path",
    "prompt",
    "messages",
    "id",
    "weights",
    "response",
    "tools",
    "chat_template_kwargs",
    "limit",
    "split",
    "subset",
    "format",
    "keep",
}


def run_retry(path: str, overrides: list[str], *, only: Collection[str] = (), is_verbose: bool) -> None:
    """Make, or continue, the run of the failed rows and say what was written."""
    run_config(retry_config(path, overrides, only=only), is_verbose=is_verbose)


def retry_config(path: str, overrides: list[str], *, only: Collection[str] = ()) -> Config:
    """Write the failed rows of the run at `path` as an input, and configure a run of them.

    The new run is in `<path>-retry`. It has the settings of the first except for overrides, so a row's draws are the
    same. The first run is not changed. A row that could not be read has no prompt to try again.

    Args:
        path: of the run.
        overrides: of its settings.
        only: ids of failed rows; empty for all of them.

    Raises:
        ConfigurationError: the run is not finished, or has no row to try again.
    """
    run = Run.open(path)
    failed = write_failed_rows(run, only)
    config = {name: run.plan.config[name] for name in Config.model_fields}  # what other jobs add decodes nothing
    tree: dict[str, Any] = json.loads(json.dumps(config))
    how_rows_are_read = {key: value for key, value in tree["input"].items() if key not in WHERE_ROWS_ARE}
    tree["input"] = how_rows_are_read | {"path": failed.input}
    if not failed.is_batch:  # whose requests say themselves where all this is
        tree["input"] |= {"id": "id", "messages": "messages"}
        tree["input"] |= {"tools": "tools"} if run.plan.has_tools else {}
    if run.plan.principal_names and not tree["grid"]["weights"]:
        tree["input"]["weights"] = "weights"
    if run.plan.has_response:
        tree["input"]["response"] = "response"
    tree["output"]["path"] = failed.path
    return parse_config(tree, overrides, source=f"the settings of {path}")
