"""The stream of a run: Ray Data passes shards to replicas and returns the result of each."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from pipeline import errors
from pipeline.cluster.board import start_board
from pipeline.cluster.host_groups import HostLaunch
from pipeline.cluster.placement import placed, resources_of, spread_hosts, sum_text, why_too_small
from pipeline.cluster.ray_errors import first_reason
from pipeline.cluster.replica import Replica
from pipeline.cluster.session import joined, lost_process
from pipeline.engine.shards import ShardOutcome
from pipeline.errors import CageError, ConfigurationError, ReplicaReleased
from pipeline.monitoring.counts import Counts
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.wiring import DIRECT, Wiring

MAX_SHARDS_IN_FLIGHT = 64
BOARD_S = 10.0


class ShardStream:
    """Decodes shards on the replicas of a Ray cluster. Use it inside `cluster`.

    Args:
        assembly: of every replica.
        run_path: the run directory.
        is_verbose: whether Ray Data's own output is shown.
        wiring: opens stores and wraps hosts.
    """

    def __init__(
        self, assembly: Assembly, run_path: str, *, is_verbose: bool = False, wiring: Wiring = DIRECT
    ) -> None:
        self._is_verbose = is_verbose
        self._wiring = wiring
        self._assembly = assembly
        self._run_path = run_path
        self._has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self._board = start_board(assembly.config.cluster, run_path)
        self._last_counts = Counts()

    def counts(self) -> Counts:
        """Answers, failed answers and tokens so far; the last known where the cluster is silent."""
        if self.error() is not None:
            return self._last_counts
        with contextlib.suppress(ray.exceptions.RayError):
            self._last_counts = ray.get(self._board.totals.remote(), timeout=BOARD_S)
        return self._last_counts

    def error(self) -> CageError | None:
        """What ended Ray on this machine, or None."""
        if (name := lost_process()) is None:
            return None
        return CageError(
            f"Ray's process {name} on this machine ended (it was killed, often for lack of memory, or crashed); what "
            "is committed is kept, and the same command continues. Its logs are in /tmp/ray/session_latest/logs"
        )

    def waits(self) -> list[str]:
        """What the replicas wait for; Ray itself where none has started."""
        try:
            found: list[str] = ray.get(self._board.waits.remote(), timeout=BOARD_S)
        except ray.exceptions.RayError as error:
            return [f"the progress board, which does not answer ({type(error).__name__})"]
        cpus = self._assembly.config.cluster.coordinator_cpus
        return found or [f"starting a replica ({cpus:g} CPU for its coordinator)"]

    def decode(self, shards: Sequence[int]) -> Generator[ShardOutcome, None, None]:
        """Decode and commit shards; yield each one's outcome when it is done, in any order.

        Shards that replicas have given up, as their machines are gone, are decoded by those that are left.

        Raises:
            CageError: Ray ended the stream. Committed shards are kept.
        """
        left = list(shards)
        while left:
            released = []
            with contextlib.closing(self._decode_once(left)) as outcomes:
                for outcome in outcomes:
                    if isinstance(outcome.error, ReplicaReleased):
                        released.append(outcome.index)
                    else:
                        yield outcome
            left = released

    def _decode_once(self, shards: Sequence[int]) -> Generator[ShardOutcome, None, None]:
        config = self._assembly.config
        _be_quiet(is_verbose=self._is_verbose)
        in_flight = min(MAX_SHARDS_IN_FLIGHT, 1 + math.ceil(config.cluster.first_slots / self._rows_per_shard()))
        replicas = config.cluster.replica_range
        num_replicas = min(replicas.max, len(shards))
        plans = self._assembly.topology.hosts
        with placed(plans, num_replicas=num_replicas, has_gpus=self._has_gpus) as (groups, places):
            launch = HostLaunch(
                (ray.put(self._assembly.hosts),),
                plans,
                self._assembly.loads,
                config.cluster,
                groups,
                places,
                self._wiring,
            )
            assembly = (ray.put(self._assembly),)
            stream = ray.data.from_items(
                [{"shard": index} for index in shards], override_num_blocks=len(shards)
            ).map_batches(
                Replica,
                fn_constructor_args=(assembly, launch, self._run_path, self._board, config.errors.max_attempts),
                batch_size=1,
                compute=ActorPoolStrategy(
                    # all are asked for at once; those without a place wait, and begin when the cluster has grown
                    min_size=min(replicas.min, num_replicas),
                    max_size=num_replicas,
                    initial_size=num_replicas,
                    max_tasks_in_flight_per_actor=in_flight,
                    max_concurrent_calls_per_actor=in_flight,
                    enable_true_multi_threading=True,
                ),
                num_cpus=config.cluster.coordinator_cpus,
                num_gpus=0,
            )
            try:
                for row in stream.iter_rows():
                    error = _as_error(row["kind"], row["error"])
                    yield ShardOutcome(row["shard"], error, row["rows"], row["failed"], row["was_committed"])
            except ray.exceptions.RayError as error:
                raise CageError(f"Ray ended the stream; what is committed is kept: {first_reason(error)}") from error

    def _rows_per_shard(self) -> int:
        config = self._assembly.config
        return config.output.rows_per_shard * config.decoding.n


@contextmanager
def cluster(assembly: Assembly, *, is_verbose: bool) -> Iterator[None]:
    """Join or start a Ray cluster that can hold a replica; see `joined`."""
    with joined(assembly.config.cluster, num_cpus=_cpus_needed(assembly), is_verbose=is_verbose):
        _check_capacity(assembly)
        yield


def _cpus_needed(assembly: Assembly) -> float:
    config = assembly.config.cluster
    per_replica = config.coordinator_cpus + sum(
        plan.model.tensor_parallel * plan.model.resources.num_cpus for plan in assembly.topology.hosts
    )
    return config.replica_range.max * per_replica


def _check_capacity(assembly: Assembly) -> None:
    """Refuse a replica that no machine of the cluster could hold, unless the cluster can grow."""
    resources = ray.cluster_resources()
    has_gpus = resources.get("GPU", 0) > 0
    if assembly.config.cluster.address is None and (reason := why_too_small(assembly.topology.hosts, resources)):
        raise ConfigurationError(reason)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for plan in spread_hosts(assembly.topology.hosts, machines, has_gpus=has_gpus):
        reserved = sum_text([resources_of(plan, has_gpus=has_gpus)])
        warnings.warn(
            f"no machine of the cluster has {reserved} for host {plan.name}: its ranks are put on several, and every "
            "layer waits for the network",
            RuntimeWarning,
            stacklevel=2,
        )


def _be_quiet(*, is_verbose: bool) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # a replica that was lost is asked for again as soon as the others have as many shards as they take
    context.actor_pool_util_upscaling_threshold = 1.0
    logging.getLogger("ray.data").setLevel(logging.INFO if is_verbose else logging.ERROR)


def _as_error(kind: str, message: str) -> CageError | None:
    """The error that a replica met, by its class name."""
    if not kind:
        return None
    error_class: Any = getattr(errors, kind, CageError)
    error: CageError = error_class(message)
    return error
