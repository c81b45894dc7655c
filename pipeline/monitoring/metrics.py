"""What a run measures of itself, by name: the metrics that a cluster exports, and how reports become their values.

Nothing here knows how metrics are exported; `pipeline.cluster.metrics` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.monitoring.counts import Counts
from pipeline.protocol.messages import HostWork

COORDINATOR = "coordinator"  # stands for a host where the coordinator does the work


class MetricKind(StrEnum):
    """How values of a metric follow each other."""

    COUNTER = "counter"  # grows; a new process begins at 0
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """A series of numbers that a run exports.

    Args:
        name: without the prefix and suffix that the exporter adds.
        kind: counter or gauge.
        description: one line, units included.
        labels: what its series differ by, beside the run and the replica.
    """

    name: str
    kind: MetricKind
    description: str
    labels: tuple[str, ...] = ()


def _counter(name: str, description: str, *labels: str) -> Metric:
    return Metric(name, MetricKind.COUNTER, description, labels)


def _gauge(name: str, description: str, *labels: str) -> Metric:
    return Metric(name, MetricKind.GAUGE, description, labels)


TOKENS = _counter("cage_tokens", "Tokens of finished answers.")
ROWS = _counter("cage_rows", "Finished answers, by outcome: aligned or failed.", "outcome")
SHARDS = _counter(
    "cage_shards",
    "Shards, by outcome: committed, found (committed before), failed or released (given up, for others).",
    "outcome",
)
ERRORS = _counter("cage_errors", "Errors by class; those that were overcome count, too.", "error")
RETRIES = _counter("cage_retries", "Repeated calls of a store, and repeated attempts of a shard.", "what")
STEPS = _counter("cage_steps", "Steps of the engine. A step draws a token for each row of a batch.")
GAMES = _counter("cage_games", "Games that were solved, those of rows that began again included.")
SOLVER_STEPS = _counter("cage_solver_steps", "Steps of the solver over all games.")
UNSOLVED = _counter("cage_unsolved_games", "Games that did not converge to the solver's tolerance.")
WAIT = _counter("cage_wait_seconds", "Seconds in which the coordinator waited for replies of hosts.")
PASSES = _counter("cage_passes", "Forward passes of a host.", "host")
PASS_TOKENS = _counter("cage_pass_tokens", "Tokens that went through a host's forward passes.", "host")
FORWARD = _counter("cage_forward_seconds", "Seconds of a host's forward passes, on its device.", "host")
SOLVE = _counter("cage_solve_seconds", "Seconds in which games were solved and tokens drawn.", "host")
IDLE = _counter("cage_idle_seconds", "Seconds in which a host had no call to answer.", "host")
SLOTS = _gauge("cage_slots", "Rows that can be decoded at once.")
SLOTS_USED = _gauge("cage_slots_used", "Rows that are being decoded.")
ROWS_WAITING = _gauge("cage_rows_waiting", "Rows without a slot, or whose prompts are not computed yet.")
CACHE = _gauge("cage_cache_bytes", "Bytes of keys, values and states of a host's rows.", "host")

METRICS = (
    TOKENS, ROWS, SHARDS, ERRORS, RETRIES, STEPS, GAMES, SOLVER_STEPS, UNSOLVED, WAIT,
    PASSES, PASS_TOKENS, FORWARD, SOLVE, IDLE, SLOTS, SLOTS_USED, ROWS_WAITING, CACHE,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Load:
    """How full an engine is now.

    Args:
        slots: rows that can be decoded at once.
        used: rows that are being decoded.
        waiting: rows without a slot, or whose prompts are not computed yet.
    """

    slots: int = 0
    used: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica's process did since it started, beside its counts.

    Args:
        number: of the replica; None before it has one.
        load: how full its engine is.
        shards: by outcome, how many shards.
        errors: of shards, by class.
        retries: by what was tried again, how often.
    """

    number: int | None = None
    load: Load = field(default_factory=Load)
    shards: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a host's process did since it was loaded.

    Args:
        work: passes, tokens, seconds and bytes.
        idle_s: seconds in which it had no call to answer.
    """

    work: HostWork = field(default_factory=HostWork)
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Value:
    """The value of one series.

    Args:
        metric: which.
        number: its value; of a counter, since its process started.
        labels: the metric's own, in its order.
    """

    metric: Metric
    number: float
    labels: tuple[str, ...] = ()


def values_of_replica(counts: Counts, report: ReplicaReport) -> Iterator[Value]:
    """The values that a replica's report stands for."""
    work, recoveries = counts.work, counts.recoveries
    yield Value(TOKENS, counts.tokens)
    yield Value(ROWS, counts.rows - counts.failed, ("aligned",))
    yield Value(ROWS, counts.failed, ("failed",))
    yield Value(STEPS, counts.steps)
    yield Value(GAMES, work.games)
    yield Value(SOLVER_STEPS, work.solver_steps)
    yield Value(UNSOLVED, work.unsolved)
    yield Value(WAIT, work.wait_s)
    yield Value(SOLVE, work.solve_s, (COORDINATOR,))
    overcome = {
        "RowError": counts.failed,
        "HostError": recoveries.hosts_failed,
        "StateLost": recoveries.states_lost,
        "HostOutOfMemory": recoveries.memory_halved,
    }
    for name in {**overcome, **report.errors}:
        yield Value(ERRORS, overcome.get(name, 0) + report.errors.get(name, 0), (name,))
    for outcome in {"committed": 0, "found": 0, "failed": 0} | dict(report.shards):
        yield Value(SHARDS, report.shards.get(outcome, 0), (outcome,))
    for what in {"storage": 0, "shard": 0} | dict(report.retries):
        yield Value(RETRIES, report.retries.get(what, 0), (what,))
    yield Value(SLOTS, report.load.slots)
    yield Value(SLOTS_USED, report.load.used)
    yield Value(ROWS_WAITING, report.load.waiting)


def values_of_host(host: str, report: HostReport) -> Iterator[Value]:
    """The values that a host's report stands for."""
    work = report.work
    yield Value(PASSES, work.num_forwards, (host,))
    yield Value(PASS_TOKENS, work.num_tokens, (host,))
    yield Value(FORWARD, work.forward_s, (host,))
    yield Value(SOLVE, work.solve_s, (host,))
    yield Value(IDLE, report.idle_s, (host,))
    yield Value(CACHE, work.cache_bytes, (host,))
