"""Whether a run goes on although rows failed: `errors.budget`, and rows that all fail for one reason."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline.config.sections import Config
from pipeline.errors import ErrorBudgetExceeded
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.reasons import FailuresByKind, add_failures
from pipeline.quoting import one_line
from pipeline.storage.commits import CommitRecord
from pipeline.storage.run import Run

SHOWN_KINDS, SHOWN_CHARACTERS = 3, 1200
FEWEST_ROWS = 8  # of a run with more rows, so many have to fail before it ends for one reason


class FailureLimit:
    """Ends a run in which more failed than the configuration allows.

    Args:
        config: of the command, whose `errors` may differ from those of the command that began the run.
        run: the run.
        committed: what is committed already.

    Raises:
        ErrorBudgetExceeded: what is committed is over the limit, so that nothing needs to start.
    """

    def __init__(self, config: Config, run: Run, committed: Iterable[CommitRecord]) -> None:
        self._run = run
        self._allowed = config.errors.allowed(run.plan.num_answers)
        self._num_failed = self._num_answered = 0
        self._failures: FailuresByKind = {}
        for record in committed:
            self._num_failed += record.failed
            self._num_answered += record.rows
            self._failures = add_failures(self._failures, record.failures)
        self._enough = _enough(config, run)
        if error := self.one_reason(Counts()):
            raise error
        self.add(0)

    def add(self, num_failed: int) -> None:
        """Count the failed answers of a committed shard. Raises ErrorBudgetExceeded."""
        self._num_failed += num_failed
        if self._num_failed > self._allowed:
            kinds = self._run.status().failures
            raise ErrorBudgetExceeded(
                f"{self._run.store.path}: {self._num_failed:,} answers failed and errors.budget allows "
                f"{self._allowed:,}; what is done is kept. The most common reasons:\n{_describe(kinds)}\n"
                f"Mend these rows and run them again: `cage retry {self._run.store.path} --input FILE`; then the "
                "same command goes on. Or go on without them: the same command with "
                f"errors.budget={self._num_failed} or more. Another configuration is a new run (--new-run)."
            )

    def one_reason(self, counts: Counts) -> ErrorBudgetExceeded | None:
        """The error that ends the run where nothing was answered and enough rows failed, all for one reason.

        Args:
            counts: what this command has done so far, answers included that are not committed.
        """
        if self._enough is None or self._num_answered or counts.rows > counts.failed:
            return None
        kinds = add_failures(self._failures, counts.failures)
        num_failed = sum(failures.count for failures in kinds.values())
        if len(kinds) != 1 or num_failed < self._enough:
            return None
        return ErrorBudgetExceeded(
            f"{self._run.store.path}: no row was answered and all {num_failed:,} so far failed for one reason; "
            f"the run ends here:\n{_describe(kinds)}\n"
            "Mend the input or the configuration and begin a new run (--new-run); or go on with the other rows: "
            "the same command with errors.stop_when_all_fail=null."
        )


def _enough(config: Config, run: Run) -> int | None:
    """Failed answers that end a run without any other answer; None where it never ends for this."""
    share = config.errors.stop_when_all_fail
    num_answers = run.plan.num_answers
    if share is None or config.errors.allowed(num_answers) >= num_answers or not run.plan.shards:
        return None
    per_row = num_answers // run.plan.num_rows
    first_shard = run.plan.shards[0].num_rows * per_row
    return max(math.ceil(share * first_shard), min(FEWEST_ROWS * per_row, num_answers))


def _describe(kinds: FailuresByKind) -> str:
    shown = list(kinds.items())[:SHOWN_KINDS]
    return "\n".join("  " + one_line(failures.describe(kind), limit=SHOWN_CHARACTERS) for kind, failures in shown)
