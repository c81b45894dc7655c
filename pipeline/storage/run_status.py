"""How far a run is, summed up from its commit records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.monitoring.counts import Recoveries
from pipeline.monitoring.reasons import FailuresByKind, add_failures
from pipeline.monitoring.values import Values, add_values, describe_silent
from pipeline.storage.commits import CommitRecord
from pipeline.storage.names import is_of_failed_rows
from pipeline.storage.plan import Plan


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far a run is. Rows are records here: one per input row, variant and sample.

    Args:
        path: of the run directory.
        digest: of the plan's fingerprint.
        num_shards: in the plan.
        num_rows: in the plan.
        shards_done: committed ones.
        rows_aligned: committed without an error.
        rows_failed: committed with an error.
        tokens: of the aligned rows.
        seconds: summed over the committed shards, which may have been computed side by side.
        failures: the failed rows by kind of reason, most frequent first.
        failed_folders: the folders with the failed rows; runs of earlier versions have another one.
        silent: one line for each principal that valued no token of the answers, by its name.
        recoveries: from faults, on the way to the committed shards.
        attempts_lost: attempts at shards before the one that was committed.
        last_commit_at: Unix time; None before the first commit.
        is_complete: whether manifest and `_SUCCESS` are written, too.
        unsteered: aligned rows whose weights are all 0.
        revised_shards: shards with rows that were run again.
        reruns: how many such rows there are, over all revisions.
        prompts: rows of the input: before each extension of the run, and now.
        passes: of the base, as commit records count them.
        accepted: tokens that took no pass of their own.
    """

    path: str
    digest: str
    num_shards: int
    num_rows: int
    shards_done: int
    rows_aligned: int
    rows_failed: int
    tokens: int
    seconds: float
    failures: FailuresByKind
    failed_folders: tuple[str, ...]
    silent: Mapping[str, str]
    recoveries: Recoveries
    attempts_lost: int
    last_commit_at: float | None
    is_complete: bool
    unsteered: int
    revised_shards: int
    reruns: int
    prompts: tuple[int, ...]
    passes: int
    accepted: int

    @property
    def errors(self) -> dict[str, int]:
        """How often each kind of reason occurred, most frequent first."""
        return {kind: failures.count for kind, failures in self.failures.items()}


def sum_up(path: str, plan: Plan, records: Iterable[CommitRecord], *, is_complete: bool) -> RunStatus:
    """Sum up the commit records of the run at `path`."""
    done = list(records)
    failures: FailuresByKind = {}
    values: Values = {}
    folders: set[str] = set()
    for record in done:
        failures = add_failures(failures, record.failures)
        values = add_values(values, record.value_ranges)
        folders.update(name.partition("/")[0] for name in record.sha256_by_file if is_of_failed_rows(name))
    return RunStatus(
        path=path,
        digest=plan.digest,
        num_shards=len(plan.shards),
        num_rows=plan.num_answers,
        shards_done=len(done),
        rows_aligned=sum(record.rows for record in done),
        rows_failed=sum(record.failed for record in done),
        tokens=sum(record.tokens for record in done),
        seconds=sum(record.seconds for record in done),
        failures=failures,
        failed_folders=tuple(sorted(folders)),
        silent=describe_silent(values, plan.config.get("principals", {})),
        recoveries=sum((Recoveries(**record.recoveries) for record in done), Recoveries()),
        attempts_lost=sum(record.attempt - 1 for record in done),
        last_commit_at=max((record.committed_at for record in done), default=None),
        is_complete=is_complete,
        unsteered=sum(record.unsteered for record in done),
        revised_shards=sum(record.revision > 0 for record in done),
        reruns=sum(record.reruns for record in done),
        prompts=tuple(dict.fromkeys([*(extent.num_rows for extent in plan.earlier), plan.num_rows])),
        passes=sum(record.passes for record in done),
        accepted=sum(record.accepted for record in done),
    )
