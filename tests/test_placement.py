"""What Ray reserves for the hosts of a replica, and who keeps which place."""

from __future__ import annotations

import pytest
from support.decoding import config_of

from pipeline.cluster import board as board_module
from pipeline.cluster.board import ProgressBoard
from pipeline.cluster.placement import bundle_of, why_too_small
from pipeline.monitoring.counts import Counts
from pipeline.runtime.topology import build_topology


def hosts(base, arm):
    principals = {"arm": {"kind": "arm", "model": {"model": "small", **arm}, "reference": "none"}}
    config = config_of("unused", principals)
    config = config.model_copy(update={"base": config.base.model_validate({"model": "large", **base})})
    return build_topology(config).hosts


@pytest.mark.parametrize(
    ("base", "arm", "has_gpus", "expected"),
    [
        ({}, {}, True, [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]),
        ({}, {}, False, [{"CPU": 1.0}, {"CPU": 1.0}]),
        ({"device": "cuda"}, {"device": "cpu"}, True, [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}]),
        (
            {"resources": {"num_cpus": 4, "num_gpus": 1}},
            {"resources": {"num_cpus": 0.5, "num_gpus": 0.25}},
            True,
            [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 0.25}],
        ),
        ({"resources": {"num_gpus": 0}}, {}, True, [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]),
    ],
)
def test_each_set_of_weights_gets_its_own_device_and_stated_cpus(base, arm, has_gpus, expected):
    assert [bundle_of(plan, has_gpus=has_gpus) for plan in hosts(base, arm)] == expected


SPREAD = {"pipeline_parallel": 2}


@pytest.mark.parametrize(
    ("base", "arm", "num_gpus", "says"),
    [
        ({}, {}, 0, None),
        (SPREAD, {"device": "cpu"}, 2, None),
        (SPREAD, {}, 0, "needs 2 GPU and the cluster has 0; start Ray where it has as many GPUs, or leave out "
         "pipeline_parallel of base"),
        ({}, SPREAD, 0, "needs 2 GPU and the cluster has 0; start Ray where it has as many GPUs, or leave out "
         "pipeline_parallel of arm"),
        (SPREAD, {}, 2, "needs 3 GPU and the cluster has 2; start Ray where it has as many GPUs, or leave out "
         "pipeline_parallel of base, and give hosts less by resources.num_gpus, or set their device: cpu and leave "
         "out num_gpus"),
        ({"device": "cuda"}, {}, 0, "needs 1 GPU and the cluster has 0; give hosts less by resources.num_gpus, or "
         "set their device: cpu and leave out num_gpus"),
        ({"resources": {"num_cpus": 9}}, {}, 0, "needs 10 CPU and the cluster has 4; give hosts less by "
         "resources.num_cpus"),
    ],
)  # fmt: skip
def test_a_cluster_that_is_too_small_is_told_what_would_do(base, arm, num_gpus, says):
    found = why_too_small(hosts(base, arm), {"CPU": 4.0, "GPU": float(num_gpus)})
    assert found == (None if says is None else f"one replica {says}")


def test_a_replica_that_restarts_finds_its_place_and_a_new_one_takes_the_oldest(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(board_module, "_is_alive", lambda node: True)
    board = ProgressBoard(2)
    assert [board.lease("a"), board.lease("b")] == [0, 1]
    clock[0] += 1
    assert board.lease("b") == 1
    assert board.lease("c") == 0  # of a, which was unheard for longest
    clock[0] += 1
    assert board.lease("c") == 0
    assert board.lease("a") == 1


def test_what_replicas_wait_for_is_reported_with_their_names(monkeypatch):
    board = ProgressBoard(2)
    board.report("old", Counts(), ["an answer"])
    board.report("one", Counts(), ["an answer of host base to load (3 s)", "the commit of shard 2 (1 s)"])
    board.report("two", Counts())
    assert sorted(board.waits()) == [
        "replica one: an answer of host base to load (3 s)",
        "replica one: the commit of shard 2 (1 s)",
        "replica two: a shard",
    ]
    monkeypatch.setattr(board_module, "SILENT_S", -1)
    assert "replica two, last heard 0 s ago: a shard" in board.waits()


def test_attempts_are_counted_by_shard_and_progress_is_summed_over_replicas():
    board = ProgressBoard(2)
    assert [board.begin(7), board.begin(7), board.begin(8)] == [1, 2, 1]
    board.report("one", Counts(3, 1, 30, 5))
    board.report("two", Counts(2, 0, 10, 2))
    board.report("one", Counts(4, 1, 44, 7))
    assert board.totals() == Counts(6, 1, 54, 9)
