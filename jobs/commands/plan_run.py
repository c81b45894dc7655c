"""What `cage plan` says of a run that is at `output.path` already."""

from __future__ import annotations

from jobs.commands.text import shown_path
from pipeline.errors import CageError
from pipeline.storage.extension import is_extension
from pipeline.storage.fingerprint import differing_fields
from pipeline.storage.plan import Plan
from pipeline.storage.plan_files import has_plan
from pipeline.storage.run import Run
from pipeline.stores.store import open_store

SHOWN_FIELDS = 3


def describe_existing(path: str, plan: Plan) -> list[str]:
    """A line on the run at `path`: how far it is, whether the plan extends it, or in what its settings differ."""
    try:
        if not has_plan(open_store(path)):
            return []
        run = Run.open(path)
        return [f"run       {shown_path(run.store.path)} {_describe(run, plan)}"]
    except CageError as error:
        return [f"run       {path}: {error}"]


def _describe(run: Run, plan: Plan) -> str:
    differing = differing_fields(run.plan.fingerprint, plan.as_begun(run.plan).fingerprint)
    if not differing:
        num_left = len(run.pending())
        return (
            "is complete"
            if run.is_complete
            else f"is begun: {num_left:,} of {len(run.plan.shards):,} shards are left"
        )
    new = plan.num_rows - run.plan.num_rows
    if is_extension(run.plan, plan, with_new_rows=False):
        return f"has {run.plan.num_rows:,} of these rows; relabel goes on with {new:,} more (input.limit)"
    if is_extension(run.plan, plan, with_new_rows=True) and new > 0:
        return f"has {run.plan.num_rows:,} rows; if the input has only grown, --extend answers the other {new:,}"
    shown = ", ".join(differing[:SHOWN_FIELDS]) + (", ..." if len(differing) > SHOWN_FIELDS else "")
    return f"holds a run with other settings ({shown}); choose another output.path, or --new-run"
