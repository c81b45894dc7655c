"""The progress board: an actor that collects what replicas report, and counts attempts.

It outlives any replica. Ray Data restarts a dead replica and repeats its calls without limit; the attempts that are
counted here set one. Its imports are few, since replicas wait for it before they start their hosts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.assignments import Assignments, Waiting
from pipeline.cluster.metrics import MetricExporter
from pipeline.cluster.ray_errors import first_reason
from pipeline.config.sections import ClusterConfig
from pipeline.errors import CageError
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.metrics import HostReport, ReplicaReport, Value, values_of_host, values_of_replica
from pipeline.monitoring.progress import IDLE

ANSWER_S = 60.0  # without an answer for so long the board counts as lost
SILENT_S = 10.0  # after so long without a report a replica is shown as silent


@dataclass(frozen=True, slots=True)
class _Report:
    counts: Counts = field(default_factory=Counts)
    waits: Sequence[str] = ()
    heard_s: float = 0.0
    measured: ReplicaReport = field(default_factory=ReplicaReport)


class _Export(Protocol):
    """What `MetricExporter` does."""

    def export(self, process: str, replica: int, values: Iterable[Value]) -> None: ...

    def clear(self, replica: int, values: Iterable[Value]) -> None: ...


class ProgressBoard:
    """Collects what all replicas did, and counts how often each shard was begun.

    Args:
        num_replicas: that run at the same time, at most.
        fewest: without which the run ends; None: `num_replicas`.
        start_timeout_s: how long there may be fewer.
        make_exporter: called once, in the board's process; where metrics are exported. None: nowhere.
    """

    def __init__(
        self,
        num_replicas: int,
        *,
        fewest: int | None = None,
        start_timeout_s: float = math.inf,
        make_exporter: Callable[[], _Export] | None = None,
    ) -> None:
        self._num_replicas = num_replicas
        self._assignments = Assignments(fewest or num_replicas, num_replicas, start_timeout_s=start_timeout_s)
        self._node_of: dict[str, str] = {}  # by actor
        self._leaving: set[str] = set()
        self._heard_s: dict[int, float] = {}  # by replica
        self._exporter = None if make_exporter is None else make_exporter()
        self._hosts: dict[tuple[int, str], HostReport] = {}
        self._places: dict[str, int] = {}
        self._reports: dict[str, _Report] = {}

    def begin(self, shard: int, replica: int | None = None) -> int:
        """Count an attempt of a shard; return how many there were, this one included."""
        return self._assignments.begin(shard, replica)

    def end(self, shard: int, replica: int, *, was_given_up: bool = False) -> None:
        """Note that a replica is done with a shard."""
        self._assignments.end(shard, replica, was_given_up=was_given_up)

    def get_place(self, replica: int) -> None:
        """Note that a replica's hosts have their place."""
        self._assignments.get_place(replica)

    def wait(self, replica: int, waited_s: float) -> Waiting:
        """What a replica is to do whose hosts have waited for a place for so long."""
        return self._assignments.wait(replica, waited_s)

    def leave(self, actor: str) -> None:
        """Note that a replica ends its process because its machine is about to go."""
        self._leaving.add(actor)

    def lease(self, actor: str, node: str = "") -> int:
        """The replica number of an actor: its old one after a restart, else a free one, or that of the one unheard
        for longest.

        Args:
            actor: the actor's id, which Ray keeps over restarts. A replica that Ray gives up gets a successor with
                another id, which takes over a number, and with it the placement group, of one that is gone.
            node: where it runs.
        """
        if actor not in self._places:
            taken = set(self._places.values())
            free = (at for at in range(self._num_replicas) if at not in taken)
            number = next(free, None)
            if number is None:
                gone = min(self._places, key=lambda each: self._heard_s[self._places[each]])
                number = self._places.pop(gone)
                self._assignments.take_over(number)
            self._places[actor] = number
        elif actor in self._leaving or not _is_alive(self._node_of[actor]):
            self._leaving.discard(actor)
            self._assignments.lose_machine(self._places[actor])
        self._node_of[actor] = node
        self._heard_s[self._places[actor]] = time.monotonic()
        return self._places[actor]

    def start(self) -> int:
        """Count a start of a replica; return how many there were since a shard was last done, this one included."""
        return self._assignments.start()

    def report(
        self, replica: str, counts: Counts, waits: Sequence[str] = (), measured: ReplicaReport | None = None
    ) -> None:
        """Replace the last report of a replica.

        Args:
            replica: the name of its process; a restarted one reports under another name and counts from 0.
            counts: what it did since its process started.
            waits: what it waits for.
            measured: what there is for metrics beside the counts.
        """
        measured = measured or ReplicaReport()
        if measured.number is not None:
            self._heard_s[measured.number] = time.monotonic()
        self._reports[replica] = _Report(counts, tuple(waits), time.monotonic(), measured)
        if self._exporter is not None and measured.number is not None:
            self._exporter.export(replica, measured.number, values_of_replica(counts, measured))
            self._clear_silent()

    def report_host(self, process: str, replica: int, host: str, report: HostReport) -> None:
        """Export what the process of a host did since it was loaded.

        Args:
            process: its name.
            replica: the number of its replica.
            host: its name in the topology.
            report: what it did.
        """
        self._hosts[replica, host] = report
        if self._exporter is not None:
            self._exporter.export(process, replica, values_of_host(host, report))

    def _clear_silent(self) -> None:
        """Set gauges of replicas that are gone to 0, unless a process that took their number reports."""
        now_s = time.monotonic()
        newest = {
            each.measured.number: each for each in sorted(self._reports.values(), key=lambda each: each.heard_s)
        }
        for number, each in newest.items():
            if self._exporter is None or number is None or now_s - each.heard_s <= SILENT_S:
                continue
            self._exporter.clear(number, values_of_replica(each.counts, each.measured))
            for (replica, host), report in self._hosts.items():
                if replica == number:
                    self._exporter.clear(number, values_of_host(host, report))

    def totals(self) -> Counts:
        """The counts of all processes that ever reported."""
        return sum((report.counts for report in self._reports.values()), Counts())

    def waits(self) -> list[str]:
        """What the replicas that reported last wait for, one line per wait, with names where there are several."""
        now_s = time.monotonic()
        lines = []
        for name, report in sorted(self._reports.items(), key=lambda item: -item[1].heard_s)[: self._num_replicas]:
            silent_s = now_s - report.heard_s
            since = f", last heard {silent_s:.0f} s ago" if silent_s > SILENT_S else ""
            named = f"replica {name}{since}: " if self._num_replicas > 1 or since else ""
            lines += [f"{named}{what}" for what in report.waits or [IDLE]]
        return lines


def _is_alive(node: str) -> bool:
    """Whether a machine is part of the cluster."""
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())


def start_board(config: ClusterConfig, run: str) -> Any:
    """Start a board on the driver's machine: losing any other machine must not lose the board.

    Args:
        config: how many replicas there may be.
        run: the label of its metrics.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    replicas = config.replica_range
    return (
        ray.remote(ProgressBoard)
        .options(num_cpus=0, scheduling_strategy=here)
        .remote(
            replicas.max,
            fewest=replicas.min,
            start_timeout_s=config.start_timeout_s,
            make_exporter=partial(MetricExporter, run),
        )
    )


def ask(answer: Any) -> Any:
    """Wait for an answer of the board. Raises CageError where it is lost or does not answer within ANSWER_S."""
    try:
        return ray.get(answer, timeout=ANSWER_S)
    except RayError as error:
        raise CageError(
            f"the progress board, on the driver's machine, does not answer: {first_reason(error)}"
        ) from None
