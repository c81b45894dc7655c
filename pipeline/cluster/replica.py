"""A replica as Ray Data's actor pool runs it: hosts start first, the coordinator's imports go on meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

from pipeline.cluster.board import ask
from pipeline.cluster.host_actors import HostGroup, HostLaunch
from pipeline.errors import CageError, HostError
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.waits import waiting_for, waits

if TYPE_CHECKING:
    from pipeline.engine.shards import ShardOutcome

STARTS_PER_ATTEMPT = 10  # replicas that may be started per attempt of a shard, over the whole run
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
        with waiting_for("starting a replica"):
            threading.Thread(target=self._keep_reporting, name="report", daemon=True).start()
            self._num_starts: int = ask(board.start.remote())
            self._max_starts = launch.cluster.replicas + STARTS_PER_ATTEMPT * max_attempts
            replica: int = ask(board.lease.remote(context.get_actor_id()))
            first_hosts = _started(launch, replica)
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
        from pipeline.engine.shards import ShardOutcome

        try:
            attempt: int = ask(self._board.begin.remote(index))
            self._check_attempts(index, attempt)
            outcome: ShardOutcome = self._coordinator.decode_and_commit(index, attempt)
        except CageError as error:
            return ShardOutcome(index, error)
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
            raise HostError(f"replicas were started {self._num_starts} times: they die before they answer")

    def _keep_reporting(self) -> None:
        while True:
            self._report()
            time.sleep(REPORT_S)

    def _report(self) -> Any:
        counts = Counts() if self._coordinator is None else self._coordinator.counts
        return self._board.report.remote(self._name, counts, waits())


def _started(launch: HostLaunch, replica: int) -> HostGroup | CageError:
    """The hosts, or why they cannot start: Ray would turn an error in a constructor into one of its own classes."""
    try:
        return HostGroup(launch, replica)
    except CageError as error:
        return error
