"""A Ray cluster of two machines with four GPUs each, which are counted and not there; where hosts go on it.

Run as a program it prints, for each scenario, every replica's hosts and for each of their ranks the machine and
CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import json
import os
from typing import Any

GPUS = 4
# the ranks of each host, the replicas, and the devices of each rank
SCENARIOS = {
    "fits": ((2, 1), 2, 1), "spans": ((3, 1, 1), 1, 1), "too large": ((5,), 1, 1), "layers": ((1, 1), 2, 2),
}  # fmt: skip


def plans_of(ranks: tuple[int, ...], num_devices: int = 1) -> Any:
    """The plans of a base and principals with so many ranks, or one process with so many devices."""
    from pipeline.config.files import parse_config
    from pipeline.runtime.topology import build_topology

    split = {"pipeline_parallel": num_devices}
    base, *others = ({"model": f"m{at}", "tensor_parallel": count, **split} for at, count in enumerate(ranks))
    principals = {f"p{at}": {"kind": "arm", "model": model, "reference": "none"} for at, model in enumerate(others)}
    tree = {"input": {"path": "unused"}, "output": {"path": "unused"}, "base": base, "principals": principals}
    return build_topology(parse_config(tree)).hosts


def where(_: Any) -> tuple[str, str]:
    """In an actor: its machine, and the GPUs that it sees."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]


def seen(ranks: tuple[int, ...], num_replicas: int, num_devices: int) -> list[list[list[tuple[str, str]]]]:
    """By replica, host and rank: the machine and its GPUs."""
    import ray

    from pipeline.cluster.host_groups import HostGroup, HostLaunch
    from pipeline.cluster.placement import placed
    from pipeline.config.sections import ClusterConfig

    plans = plans_of(ranks, num_devices)
    with placed(plans, num_replicas=num_replicas, has_gpus=True) as (groups, places):
        no_specs = (ray.put(()),)  # there is nothing to load
        launch = HostLaunch(no_specs, plans, ("load",) * len(plans), ClusterConfig(), groups, places)
        started = [HostGroup(launch, replica) for replica in range(num_replicas)]
        try:
            return [
                [ray.get([actor.__ray_call__.remote(where) for actor in actors]) for actors in group.actors]
                for group in started
            ]
        finally:
            for group in started:
                group.stop()


def main() -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=8, num_gpus=GPUS)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    print(json.dumps({name: seen(*scenario) for name, scenario in SCENARIOS.items()}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
