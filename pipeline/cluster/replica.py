"""A replica as Ray Data's actor pool runs it: hosts start first, the coordinator's imports go on meanwhile."""

from __future__ import annotations

from typing import Any

import ray

from pipeline.cluster.host_actors import HostGroup, HostLaunch
from pipeline.errors import CageError, HostError

STARTS_PER_ATTEMPT = 10


class Replica:
    """One coordinator with its hosts. Ray Data calls it from several threads, a shard each.

    Args:
        launch: the hosts.
        run_path: the run directory; its plan says what a shard is.
        board: where progress is reported and attempts are counted, an actor handle.
        max_attempts: of one shard.
    """

    def __init__(self, launch: HostLaunch, run_path: str, board: Any, max_attempts: int) -> None:
        self._board = board
        self._max_attempts = max_attempts
        self._num_starts: int = ray.get(board.start.remote())
        self._max_starts = launch.cluster.replicas + STARTS_PER_ATTEMPT * max_attempts
        replica: int = ray.get(board.lease.remote(ray.get_runtime_context().get_actor_id()))
        first_hosts = _started(launch, replica)
        from pipeline.cluster.coordinator import Coordinator  # seconds of imports, while the hosts load

        self._coordinator = Coordinator(launch, replica, first_hosts, run_path, board, max_attempts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Decode and commit the shards of a batch; what came of each, never an exception."""
        errors = [self._decode(int(index)) for index in batch["shard"]]
        return {
            "shard": list(batch["shard"]),
            "kind": ["" if error is None else type(error).__name__ for error in errors],
            "error": ["" if error is None else str(error) for error in errors],
        }

    def _decode(self, index: int) -> CageError | None:
        try:
            attempt: int = ray.get(self._board.begin.remote(index))
            self._check_attempts(index, attempt)
            self._coordinator.decode_and_commit(index, attempt)
        except CageError as error:
            return error
        return None

    def _check_attempts(self, index: int, attempt: int) -> None:
        """End what would go on for ever: a shard that kills its replica, replicas that do not live."""
        if attempt > self._max_attempts:
            raise HostError(
                f"shard {index} was given up after {self._max_attempts} attempts: its replica died each time"
            )
        if self._num_starts > self._max_starts:
            raise HostError(f"replicas were started {self._num_starts} times: they die before they answer")


def _started(launch: HostLaunch, replica: int) -> HostGroup | CageError:
    """The hosts, or why they cannot start: an error in a constructor would lose its class on the way."""
    try:
        return HostGroup(launch, replica)
    except CageError as error:
        return error
