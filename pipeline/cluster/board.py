"""The progress board: an actor that collects what replicas report, and counts attempts.

It outlives any replica. Ray Data restarts a dead replica and repeats its calls without limit; the attempts that are
counted here set one. Its imports are few, since replicas wait for it before they start their hosts.
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

from pipeline.cluster.ray_errors import first_reason
from pipeline.errors import CageError
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.progress import IDLE

ANSWER_S = 60.0  # without an answer for so long the board counts as lost
SILENT_S = 10.0  # after so long without a report a replica is shown as silent


@dataclass(frozen=True, slots=True)
class _Report:
    counts: Counts = field(default_factory=Counts)
    waits: Sequence[str] = ()
    heard_s: float = 0.0


class ProgressBoard:
    """Collects what all replicas did, and counts how often each shard was begun.

    Args:
        num_replicas: that run at the same time.
    """

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._actors: list[str] = []
        self._places: dict[str, int] = {}
        self._reports: dict[str, _Report] = {}
        self._attempts: Counter[int] = Counter()
        self._num_starts = 0

    def begin(self, shard: int) -> int:
        """Count an attempt of a shard; return how many there were, this one included."""
        self._attempts[shard] += 1
        return self._attempts[shard]

    def lease(self, actor: str) -> int:
        """The replica number of an actor: its old one after a restart, else the one leased longest ago.

        Args:
            actor: the actor's id, which Ray keeps over restarts. A replica that Ray gives up gets a successor with
                another id, which takes over a number, and with it the placement group, of one that is gone.
        """
        if actor not in self._actors:
            if len(self._actors) == self._num_replicas:
                self._actors.pop(0)
            self._actors.append(actor)
            taken = {self._places[other] for other in self._actors if other in self._places}
            self._places[actor] = next(at for at in range(self._num_replicas) if at not in taken)
        return self._places[actor]

    def start(self) -> int:
        """Count a start of a replica; return how many there were, this one included."""
        self._num_starts += 1
        return self._num_starts

    def report(self, replica: str, counts: Counts, waits: Sequence[str] = ()) -> None:
        """Replace the last report of a replica.

        Args:
            replica: the name of its process; a restarted one reports under another name and counts from 0.
            counts: what it did since its process started.
            waits: what it waits for.
        """
        self._reports[replica] = _Report(counts, tuple(waits), time.monotonic())

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


def start_board(num_replicas: int) -> Any:
    """Start a board on the driver's machine: losing any other machine must not lose the board."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=here).remote(num_replicas)


def ask(answer: Any) -> Any:
    """Wait for an answer of the board. Raises CageError where it is lost or does not answer within ANSWER_S."""
    try:
        return ray.get(answer, timeout=ANSWER_S)
    except RayError as error:
        raise CageError(
            f"the progress board, on the driver's machine, does not answer: {first_reason(error)}"
        ) from None
