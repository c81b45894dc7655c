"""Which machines of a cluster can train an adapter."""

from __future__ import annotations

import pytest

from pipeline.cluster.training import why_no_machine

NODES = [{"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}, {}]


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "reason"),
    [
        (8, 0, None),
        (2, 1, None),
        (0.5, 0.5, None),
        (9, 0, "base.resources.num_cpus is 9, and no machine of the cluster has more than 8 CPUs"),
        (1, 2, "base.resources.num_gpus is 2, and no machine of the cluster has more than 1 GPUs"),
        (4, 1, "base.resources: no machine of the cluster has 4 CPUs and 1 GPUs together"),
    ],
)
def test_a_training_that_no_machine_has_room_for_is_refused_and_not_waited_for(num_cpus, num_gpus, reason):
    assert why_no_machine(NODES, num_cpus=num_cpus, num_gpus=num_gpus) == reason
