"""The hosts of one replica: started together in its placement group, stopped together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.cluster.assignments import Waiting
from pipeline.cluster.board import ask
from pipeline.cluster.host_actors import HostActor, RayHost, hosts_of
from pipeline.cluster.host_reports import HostReports
from pipeline.cluster.placement import HostPlace, draining_nodes, nodes_of, placed, sum_text
from pipeline.config.sections import ClusterConfig
from pipeline.errors import CageError, ConfigurationError, ReplicaReleased
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.hosts import Hosts
from pipeline.protocol.specs import RankPlace
from pipeline.protocol.topology import HostPlan
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.wiring import DIRECT, Wiring

PLACE_S = 5.0  # from one look for a place to the next
REPORTED_S = 5.0  # for the last reports of hosts


@dataclass(frozen=True, slots=True)
class HostLaunch:
    """What it takes to place the hosts of a replica; light, so that they start before the coordinator's imports.

    Args:
        specs: a reference to the specs of all hosts, in a tuple so that Ray does not replace it by its value.
        plans: of the hosts.
        loads: what is waited for while each of them loads.
        cluster: time limits.
        groups: one placement group per replica. The driver creates and removes them: a group that a replica creates
            is left behind with its CPUs and GPUs when the replica dies, as Ray keeps the groups of an actor that can
            restart.
        places: where each host goes in a group.
        wiring: opens stores and wraps hosts.
    """

    specs: tuple[Any]
    plans: tuple[HostPlan, ...]
    loads: tuple[str, ...]
    cluster: ClusterConfig
    groups: tuple[PlacementGroup, ...]
    places: tuple[HostPlace, ...]
    wiring: Wiring = DIRECT


class HostGroup:
    """The hosts of one replica: started together in its placement group, stopped together.

    Creating a group starts the actors and returns while they load, so that the caller can import meanwhile.

    Args:
        launch: what to start, and where.
        replica: its number, which selects the placement group.
        board: where the hosts report, an actor handle; None: nowhere.

    Raises:
        ConfigurationError: the cluster did not provide the resources within `cluster.start_timeout_s`.
        ReplicaReleased: it has fewer machines than before, and others have room for the replica's shards.

    Attributes:
        actors: by host and rank.
    """

    def __init__(self, launch: HostLaunch, replica: int, board: Any = None) -> None:
        self._launch = launch
        self._replica = replica
        self._board = board
        self._place = launch.groups[replica]
        needed, timeout_s = sum_text(self._place.bundle_specs), launch.cluster.start_timeout_s
        with waiting_for(f"{needed} of the cluster for the hosts"):
            self._await_place(needed)
        self.actors = [self._start_ranks(index, place) for index, place in enumerate(launch.places)]
        self._loads = [
            RayHost(actors, plan, timeout_s).load(wait)
            for (actors, plan), wait in zip(self._planned(), launch.loads, strict=True)
        ]

    def _await_place(self, needed: str) -> None:
        """Wait for the placement group, on machines that stay."""
        timeout_s = self._launch.cluster.start_timeout_s
        began_s = time.monotonic()
        while not self._has_place():
            waited_s = time.monotonic() - began_s
            if self._board is None:
                decision = Waiting.END_RUN if waited_s >= timeout_s else Waiting.GO_ON
            else:
                decision = ask(self._board.wait.remote(self._replica, waited_s))
            if decision is Waiting.END_RUN:
                raise ConfigurationError(f"the cluster did not provide {needed} for a replica within {timeout_s:g} s")
            if decision is Waiting.GIVE_UP_SHARDS:
                raise ReplicaReleased(f"replica {self._replica} has no machine with {needed} any more")
        if self._board is not None:
            ask(self._board.get_place.remote(self._replica))

    def _has_place(self) -> bool:
        if not self._place.wait(min(PLACE_S, self._launch.cluster.start_timeout_s)):
            return False
        if not nodes_of(self._place) & draining_nodes():
            return True
        time.sleep(PLACE_S)
        return False

    def wait(self) -> Hosts:
        """Wait until every host has loaded its weights, and return their clients.

        Raises:
            CageError: one of them failed; all are stopped.
        """
        try:
            for load in self._loads:
                load.result()
        except CageError:
            self.stop()
            raise
        timeout_s = self._launch.cluster.step_timeout_s
        return hosts_of([RayHost(actors, plan, timeout_s) for actors, plan in self._planned()])

    def report(self) -> None:
        """Have the hosts report what they did up to now; not waited for long: they may hang or be gone."""
        asked = {first.report.remote(): plan.name for (first, *_), plan in self._planned()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=REPORTED_S)
        for reference in answered:
            with suppress(RayError):
                if report := ray.get(reference, timeout=REPORTED_S):
                    self._board.report_host.remote(report[0], self._replica, asked[reference], report[1])

    def stop(self) -> None:
        """End the actors. They hold no state that is needed: rows belong to the coordinator."""
        for actor in chain.from_iterable(self.actors):
            ray.kill(actor)

    def _planned(self) -> list[tuple[list[Any], HostPlan]]:
        return list(zip(self.actors, self._launch.plans, strict=True))

    def _start_ranks(self, index: int, place: HostPlace) -> list[Any]:
        """An actor for each rank of a host; the first one reports."""
        launch, size = self._launch, len(place.bundles)
        timeout_s = max(launch.cluster.start_timeout_s, launch.cluster.step_timeout_s)
        actors = []
        for rank, bundle in enumerate(place.bundles):
            rank_place = RankPlace(rank, size, "", place.is_on_one_machine, timeout_s) if size > 1 else None
            actor_class = ray.remote(HostActor).options(
                num_cpus=place.each_rank["CPU"],
                num_gpus=place.each_rank.get("GPU", 0),
                max_restarts=0,  # see pipeline.cluster.host_actors
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._place, bundle),
            )
            reports = self._reports(index) if rank == 0 else None
            actors.append(actor_class.remote(launch.specs, index, launch.wiring.wrap_host, reports, rank_place))
        return actors

    def _reports(self, index: int) -> HostReports | None:
        if self._board is None:
            return None
        return HostReports(self._board, self._replica, self._launch.plans[index].name)


@contextmanager
def one_replica(assembly: Assembly) -> Iterator[Hosts]:
    """The loaded hosts of a single replica on the joined cluster; they are stopped at the end of the block."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    plans = assembly.topology.hosts
    with placed(plans, num_replicas=1, has_gpus=has_gpus) as (groups, places):
        specs = (ray.put(assembly.hosts),)
        launch = HostLaunch(specs, plans, assembly.loads, assembly.config.cluster, groups, places)
        group = HostGroup(launch, 0)
        try:
            yield group.wait()
        finally:
            group.stop()
