"""A replica as Ray Data's actor pool runs it: hosts start first, the coordinator's imports go on meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import ray

from pipeline.cluster.board import ask
from pipeline.cluster.departure import Departure
from pipeline.cluster.host_groups import HostGroup, HostLaunch
from pipeline.errors import CageError, HostError, ReplicaReleased
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.metrics import Load, ReplicaReport
from pipeline.monitoring.waits import waiting_for, waits
from pipeline.stores.retries import num_repeats

if TYPE_CHECKING:
    from pipeline.engine.shards import ShardOutcome

STARTS_PER_ATTEMPT = 10  # replicas that may be started per attempt of a shard, while none is done
REPORT_S = 1.0


class Replica:
    """One coordinator with its hosts. Ray Data calls it from several threads, with one shard each.

    Args:
        assembly: a reference to the assembly, in a tuple so that Ray does not replace it by its value.
        launch: how its hosts are started.
        run_path: the run directory; its plan says what a shard is.
        board: where progress is reported and attempts are counted, an actor handle.
        max_attempts: of one shard.
    """

    def __init__(
        self, assembly: tuple[Any], launch: HostLaunch, run_path: str, board: Any, max_attempts: int
    ) -> None:
        self._board = board
        self._max_attempts = max_attempts
        context = ray.get_runtime_context()
        self._name = f"{context.get_node_id()[:8]}-{os.getpid()}"
        self._coordinator: Any = None
        self._number: int | None = None
        self._departure: Departure
        self._shards: Counter[str] = Counter()  # by outcome
        self._errors: Counter[str] = Counter()  # by class
        self._repeats = 0  # attempts of shards after the first
        with waiting_for("starting a replica"):
            threading.Thread(target=self._keep_reporting, name="report", daemon=True).start()
            self._num_starts: int = ask(board.start.remote())
            self._max_starts = launch.cluster.replica_range.max + STARTS_PER_ATTEMPT * max_attempts
            replica: int = ask(board.lease.remote(context.get_actor_id(), context.get_node_id()))
            self._departure = Departure(launch.groups[replica], context.get_actor_id(), context.get_node_id(), board)
            self._number = replica
            first_hosts = _started(launch, replica, board)
        with waiting_for("; ".join(launch.loads)):  # the hosts load meanwhile, and that takes longer
            from pipeline.cluster.coordinator import Coordinator  # takes seconds, in which the hosts load

            self._coordinator = Coordinator(
                ray.get(assembly[0]), launch, replica, first_hosts, run_path, board, max_attempts, name=self._name
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Decode and commit the shards of a batch and return the result of each.

        Errors are returned, never raised: Ray Data would end the whole stream, or repeat the call without limit.
        """
        outcomes = [self._decode(int(index)) for index in batch["shard"]]
        self._coordinator.report_hosts()
        with contextlib.suppress(CageError):  # a lost board is reported when the next shard begins, if there is one
            ask(self._report())  # wait, so that the driver sees a shard's counts no later than the shard
        return {
            "shard": list(batch["shard"]),
            "kind": ["" if each.error is None else type(each.error).__name__ for each in outcomes],
            "error": ["" if each.error is None else str(each.error) for each in outcomes],
            "rows": [each.rows for each in outcomes],
            "failed": [each.failed for each in outcomes],
            "was_committed": [each.was_committed for each in outcomes],
        }

    def _decode(self, index: int) -> ShardOutcome:
        with self._departure.unless_leaving():
            outcome = self._try(index)
            was_given_up = isinstance(outcome.error, ReplicaReleased)
            with contextlib.suppress(CageError):  # a lost board is reported when the next shard begins
                ask(self._board.end.remote(index, self._number, was_given_up=was_given_up))
        return outcome

    def _try(self, index: int) -> ShardOutcome:
        from pipeline.engine.shards import ShardOutcome

        try:
            attempt: int = ask(self._board.begin.remote(index, self._number))
            self._repeats += attempt > 1
            self._check_attempts(index, attempt)
            outcome: ShardOutcome = self._coordinator.decode_and_commit(index, attempt)
        except ReplicaReleased as error:  # no error of the run: others have room for the shard
            self._shards["released"] += 1
            return ShardOutcome(index, error)
        except CageError as error:
            self._shards["failed"] += 1
            self._errors[type(error).__name__] += 1
            return ShardOutcome(index, error)
        self._shards["found" if outcome.was_committed else "committed"] += 1
        return outcome

    def _check_attempts(self, index: int, attempt: int) -> None:
        """Raise HostError where Ray Data would repeat without end.

        That is for a shard that kills its replica, and for replicas that die before they answer.
        """
        if attempt > self._max_attempts:
            raise HostError(
                f"shard {index} was given up after {self._max_attempts} attempts: its replica died each time"
            )
        if self._num_starts > self._max_starts:
            raise HostError(
                f"replicas were started {self._num_starts} times while no shard was done: they die before they answer"
            )

    def _keep_reporting(self) -> None:
        while True:
            self._report()
            time.sleep(REPORT_S)

    def _report(self) -> Any:
        coordinator = self._coordinator
        counts = Counts() if coordinator is None else coordinator.counts
        measured = ReplicaReport(
            self._number,
            Load() if coordinator is None else coordinator.load,
            dict(self._shards),
            dict(self._errors),
            {"storage": num_repeats(), "shard": self._repeats},
        )
        return self._board.report.remote(self._name, counts, waits(), measured)


def _started(launch: HostLaunch, replica: int, board: Any) -> HostGroup | CageError:
    """The hosts, or why they cannot start: Ray would turn an error in a constructor into one of its own classes."""
    try:
        return HostGroup(launch, replica, board)
    except CageError as error:
        return error
