"""Counts of a run, as every transport reports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.monitoring.reasons import Failures, add_failures
from pipeline.monitoring.values import ValueRange, add_values


@dataclass(frozen=True, slots=True)
class Recoveries:
    """Faults that were overcome.

    Args:
        hosts_failed: hosts that failed and were replaced.
        states_lost: times that a host lost its state and rows began again.
        memory_halved: times that the rows at once were halved for lack of memory.
    """

    hosts_failed: int = 0
    states_lost: int = 0
    memory_halved: int = 0

    def __add__(self, other: Recoveries) -> Recoveries:
        return Recoveries(
            self.hosts_failed + other.hosts_failed,
            self.states_lost + other.states_lost,
            self.memory_halved + other.memory_halved,
        )

    def __sub__(self, other: Recoveries) -> Recoveries:
        return Recoveries(
            self.hosts_failed - other.hosts_failed,
            self.states_lost - other.states_lost,
            self.memory_halved - other.memory_halved,
        )

    def describe(self) -> str:
        """The counts that are not 0, as text for people; empty when all are 0."""
        parts = {
            "hosts replaced": self.hosts_failed,
            "states rebuilt": self.states_lost,
            "batches halved for memory": self.memory_halved,
        }
        return ", ".join(f"{what} {count:,}" for what, count in parts.items() if count)


@dataclass(frozen=True, slots=True)
class Work:
    """What a coordinator did beside the answers; steps that began again count each time.

    Args:
        games: that were solved, over tokens, blocks or answers.
        solver_steps: over all of them.
        unsolved: games that did not converge to the solver's tolerance.
        solve_s: seconds in which games were solved here; a lone host solves its own.
        wait_s: seconds in which replies of hosts were waited for.
    """

    games: int = 0
    solver_steps: int = 0
    unsolved: int = 0
    solve_s: float = 0.0
    wait_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.games + other.games,
            self.solver_steps + other.solver_steps,
            self.unsolved + other.unsolved,
            self.solve_s + other.solve_s,
            self.wait_s + other.wait_s,
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """What was done since the command started.

    Args:
        rows: answers done, failed ones included.
        failed: answers without a result.
        tokens: of finished answers.
        steps: of the engines. A step draws a token for each row of a batch, also for a row that began again.
        recoveries: faults that were overcome.
        failures: the failed answers by kind of reason.
        values: of each principal over all drawn tokens.
        work: games and seconds.
    """

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    steps: int = 0
    recoveries: Recoveries = field(default_factory=Recoveries)
    failures: Mapping[str, Failures] = field(default_factory=dict)
    values: Mapping[str, ValueRange] = field(default_factory=dict)
    work: Work = field(default_factory=Work)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows + other.rows,
            self.failed + other.failed,
            self.tokens + other.tokens,
            self.steps + other.steps,
            self.recoveries + other.recoveries,
            add_failures(self.failures, other.failures),
            add_values(self.values, other.values),
            self.work + other.work,
        )
