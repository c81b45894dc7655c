"""What Ray reserves for replicas: a placement group for the hosts of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from pipeline.protocol.topology import HostPlan


@contextmanager
def placed(plans: Sequence[HostPlan], *, num_replicas: int, has_gpus: bool) -> Iterator[tuple[PlacementGroup, ...]]:
    """A placement group for the hosts of each replica, removed at the end of the block; some may be pending.

    A group reserves the resources of all hosts of a replica at once: two replicas that each got half of their hosts
    would wait for each other without end.
    """
    bundles = [bundle_of(plan, has_gpus=has_gpus) for plan in plans]
    groups = tuple(placement_group(bundles, strategy="PACK") for _ in range(num_replicas))
    try:
        yield groups
    finally:
        for group in groups:
            remove_placement_group(group)


def bundle_of(plan: HostPlan, *, has_gpus: bool) -> dict[str, float]:
    """What Ray reserves for a host: CPUs, and one GPU where the device is a GPU, unless the configuration says."""
    resources = plan.model.resources
    num_gpus = resources.num_gpus
    if num_gpus is None:
        wants_gpu = plan.model.device.startswith("cuda") or (plan.model.device == "auto" and has_gpus)
        num_gpus = 1.0 if wants_gpu else 0.0
    return {"CPU": resources.num_cpus} | ({"GPU": num_gpus} if num_gpus else {})


def sum_text(bundles: Sequence[Mapping[str, float]]) -> str:
    """What bundles reserve together, for messages."""
    total = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    return " and ".join(f"{amount:g} {kind}" for kind, amount in total.items() if amount)


def nodes_of(group: PlacementGroup) -> set[str]:
    """The machines on which a placement group is, by Ray's ids; empty while it waits for some."""
    return {node for node in placement_group_table(group).get("bundles_to_node_id", {}).values() if node}


def draining_nodes() -> set[str]:
    """The machines that are about to go: a spot machine that was told so, or one that is drained by hand."""
    return set(ray._private.state.state.get_draining_nodes())
