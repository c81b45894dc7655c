"""Where the hosts of a replica go on a Ray cluster: a placement group for each replica, and in it a place for each
rank.

A bundle of a group is always on one machine. So the ranks of a host share a bundle, and its GPUs are of one machine;
only where no machine has as many does each rank get a bundle of its own. A process with several GPUs has one bundle.
Groups are packed: a replica uses several machines only where it must.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from pipeline.protocol.topology import HostPlan

Bundle = dict[str, float]


@dataclass(frozen=True, slots=True)
class HostPlace:
    """Where a host goes in its replica's placement group.

    Args:
        each_rank: what Ray reserves for each rank.
        bundles: by rank, the number of its bundle in the group.
    """

    each_rank: Bundle
    bundles: tuple[int, ...]

    @property
    def is_on_one_machine(self) -> bool:
        """Whether all ranks are on the same machine for certain."""
        return len(set(self.bundles)) == 1


@contextmanager
def placed(
    plans: Sequence[HostPlan], *, num_replicas: int, has_gpus: bool
) -> Iterator[tuple[tuple[PlacementGroup, ...], tuple[HostPlace, ...]]]:
    """A placement group for the hosts of each replica, removed at the end of the block; some may be pending.

    A group reserves the resources of all hosts of a replica at once: two replicas that each got half of their hosts
    would wait for each other without end.

    Yields:
        The groups, and where each host goes in any of them.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    bundles, places = lay_out(plans, machines, has_gpus=has_gpus)
    groups = tuple(placement_group(bundles, strategy="PACK") for _ in range(num_replicas))
    try:
        yield groups, places
    finally:
        for group in groups:
            remove_placement_group(group)


def lay_out(
    plans: Sequence[HostPlan], machines: Sequence[Mapping[str, float]], *, has_gpus: bool
) -> tuple[list[Bundle], tuple[HostPlace, ...]]:
    """The bundles of a replica's placement group, and where each host goes in it.

    Args:
        plans: of the hosts.
        machines: what each machine of the cluster has, by Ray's names.
        has_gpus: whether the cluster has GPUs.
    """
    bundles: list[Bundle] = []
    places = []
    for plan in plans:
        each, whole = bundle_of(plan, has_gpus=has_gpus), resources_of(plan, has_gpus=has_gpus)
        num_ranks, first = plan.model.tensor_parallel, len(bundles)
        if num_ranks == 1 or any(_holds(machine, whole) for machine in machines):
            bundles.append(whole)
            places.append(HostPlace(each, (first,) * num_ranks))
        else:
            bundles += [each] * num_ranks
            places.append(HostPlace(each, tuple(range(first, first + num_ranks))))
    return bundles, tuple(places)


def spread_hosts(
    plans: Sequence[HostPlan], machines: Sequence[Mapping[str, float]], *, has_gpus: bool
) -> list[HostPlan]:
    """The hosts whose ranks no machine of the cluster can hold together."""
    _, places = lay_out(plans, machines, has_gpus=has_gpus)
    return [plan for plan, place in zip(plans, places, strict=True) if not place.is_on_one_machine]


def bundle_of(plan: HostPlan, *, has_gpus: bool) -> Bundle:
    """What Ray reserves for a host, or for each of its ranks: CPUs, and one GPU where the device is a GPU, or as many
    as its layers are spread over, unless the configuration says."""
    resources = plan.model.resources
    num_gpus = resources.num_gpus
    if num_gpus is None:
        count = plan.model.pipeline_parallel
        wants_gpu = plan.model.device.startswith("cuda") or (plan.model.device == "auto" and has_gpus) or count > 1
        num_gpus = float(count) if wants_gpu else 0.0
    return {"CPU": resources.num_cpus} | ({"GPU": num_gpus} if num_gpus else {})


def resources_of(plan: HostPlan, *, has_gpus: bool) -> Bundle:
    """What Ray reserves for a host, all ranks together."""
    return {kind: plan.model.tensor_parallel * amount for kind, amount in bundle_of(plan, has_gpus=has_gpus).items()}


def why_too_small(plans: Sequence[HostPlan], resources: Mapping[str, float]) -> str | None:
    """Why a cluster with these resources cannot hold a replica, and what would be right; None where it can.

    Args:
        plans: of the replica's hosts.
        resources: of the whole cluster, by Ray's names.
    """
    has_gpus = resources.get("GPU", 0.0) > 0
    bundles = [resources_of(plan, has_gpus=has_gpus) for plan in plans]
    for kind in ("CPU", "GPU"):
        needed, there = sum(bundle.get(kind, 0.0) for bundle in bundles), resources.get(kind, 0.0)
        if needed > there:
            ways = ["give hosts less by resources.num_cpus"] if kind == "CPU" else _ways_to_fewer_gpus(plans, bundles)
            return f"one replica needs {needed:g} {kind} and the cluster has {there:g}; {', and '.join(ways)}"
    return None


def _ways_to_fewer_gpus(plans: Sequence[HostPlan], bundles: Sequence[Bundle]) -> list[str]:
    """What those who need GPUs can do: layers are spread over GPUs alone, and over whole ones."""
    ways = []
    spread = [name for plan in plans for name in plan.serves if plan.model.pipeline_parallel > 1]
    if spread:
        ways.append(f"start Ray where it has as many GPUs, or leave out pipeline_parallel of {', '.join(spread)}")
    if any(
        bundle.get("GPU") and plan.model.pipeline_parallel == 1 for plan, bundle in zip(plans, bundles, strict=True)
    ):
        ways.append("give hosts less by resources.num_gpus, or set their device: cpu and leave out num_gpus")
    return ways


def sum_text(bundles: Sequence[Mapping[str, float]]) -> str:
    """What some bundles reserve together, in words."""
    total = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    return " and ".join(f"{amount:g} {kind}" for kind, amount in total.items() if amount)


def _holds(machine: Mapping[str, float], bundle: Bundle) -> bool:
    return all(machine.get(kind, 0.0) >= amount for kind, amount in bundle.items())


def nodes_of(group: PlacementGroup) -> set[str]:
    """The machines on which a placement group is, by Ray's ids; empty while it waits for some."""
    return {node for node in placement_group_table(group).get("bundles_to_node_id", {}).values() if node}


def draining_nodes() -> set[str]:
    """The machines that are about to go: a spot machine that was told so, or one that is drained by hand."""
    return set(ray._private.state.state.get_draining_nodes())
