"""The board: an actor on which replicas say how far they are and what they wait for, and which counts attempts.

It outlives any replica: Ray Data restarts a dead replica and calls it again for ever, and the counts kept here end
that. Its imports are few, since replicas wait for it before they start their hosts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import CageError
from pipeline.monitoring.counts import Counts

ANSWER_S = 60.0
SILENT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Report:
    counts: Counts = field(default_factory=Counts)
    waits: Sequence[str] = ()
    heard_s: float = 0.0


class ProgressBoard:
    """What all replicas did, and how often each shard was begun."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._actors: list[str] = []
        self._places: dict[str, int] = {}
        self._reports: dict[str, _Report] = {}
        self._attempts: Counter[int] = Counter()
        self._num_starts = 0

    def begin(self, shard: int) -> int:
        """Number of times that the shard was begun, this one included."""
        self._attempts[shard] += 1
        return self._attempts[shard]

    def lease(self, actor: str) -> int:
        """The replica number of an actor: its old one after a restart, else the one leased longest ago."""
        if actor not in self._actors:
            if len(self._actors) == self._num_replicas:
                self._actors.pop(0)
            self._actors.append(actor)
            taken = {self._places[other] for other in self._actors if other in self._places}
            self._places[actor] = next(at for at in range(self._num_replicas) if at not in taken)
        return self._places[actor]

    def start(self) -> int:
        """Number of times that a replica was started, this one included."""
        self._num_starts += 1
        return self._num_starts

    def report(self, replica: str, counts: Counts, waits: Sequence[str] = ()) -> None:
        self._reports[replica] = _Report(counts, tuple(waits), time.monotonic())

    def totals(self) -> Counts:
        return sum((report.counts for report in self._reports.values()), Counts())

    def waits(self) -> list[str]:
        """What replicas wait for, each with its name; those of which nothing was heard lately say so."""
        now_s = time.monotonic()
        lines = []
        for name, report in sorted(self._reports.items(), key=lambda item: -item[1].heard_s)[: self._num_replicas]:
            silent_s = now_s - report.heard_s
            since = f", last heard {silent_s:.0f} s ago" if silent_s > SILENT_S else ""
            lines += [f"replica {name}{since}: {what}" for what in report.waits or ["a shard"]]
        return lines


def start_board(num_replicas: int) -> Any:
    """A board on this machine: it must not be lost with another one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=here).remote(num_replicas)


def ask(answer: Any) -> Any:
    """The board's answer. Raises CageError when the board is gone or silent."""
    try:
        return ray.get(answer, timeout=ANSWER_S)
    except RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise CageError(
            f"the progress board, on the driver's machine, does not answer: {type(error).__name__}: {reason}"
        ) from None
