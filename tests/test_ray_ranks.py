"""Hosts whose weights are split over several actors, and where Ray puts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from support import failpoints
from support.failpoints import Failpoint, KillAt
from support.fake_gpus import GPUS, plans_of
from support.rank_groups import make_divisible
from support.runs import job, parts, run_job, write_prompts

from pipeline.cluster.placement import lay_out, spread_hosts

HERE = Path(__file__).parent
NODE = {"CPU": 8.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("ranks", "machines", "bundles", "places"),
    [
        ((1, 1), [NODE], [1, 1], [(0,), (1,)]),
        ((4, 1), [NODE, NODE], [4, 1], [(0, 0, 0, 0), (1,)]),
        ((2, 6, 1), [NODE, NODE], [2, *[1] * 6, 1], [(0, 0), (1, 2, 3, 4, 5, 6), (7,)]),
    ],
)
def test_ranks_share_a_bundle_where_a_machine_has_as_many_gpus(ranks, machines, bundles, places):
    plans = plans_of(ranks)
    found, where = lay_out(plans, machines, has_gpus=True)
    assert found == [{"CPU": float(gpus), "GPU": float(gpus)} for gpus in bundles]
    assert [place.bundles for place in where] == places
    assert all(place.each_rank == {"CPU": 1.0, "GPU": 1.0} for place in where)
    assert [plan.model.tensor_parallel for plan in spread_hosts(plans, machines, has_gpus=True)] == [
        count for count in ranks if count > NODE["GPU"]
    ]


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
def test_base_principals_and_ranks_are_on_gpus_of_their_own_and_span_machines_only_where_they_must():
    done = subprocess.run(
        [sys.executable, "-m", "support.fake_gpus"], cwd=HERE, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    spread = [host for hosts in found.pop("layers") for host in hosts]
    gpus = [(machine, gpu) for ((machine, gpus),) in spread for gpu in gpus.split(",")]
    assert len(gpus) == len(set(gpus)) == 8  # each of the four processes sees two, and no other one sees them
    for replicas in found.values():
        ranks = [tuple(rank) for hosts in replicas for host in hosts for rank in host]
        assert all(gpus in {str(gpu) for gpu in range(GPUS)} for _, gpus in ranks)  # each sees one
        assert len(set(ranks)) == len(ranks)  # and no other one sees it

    def machines(hosts):
        return {machine for host in hosts for machine, _ in host}

    one, other = found["fits"]
    assert [len(host) for host in one] == [2, 1]
    assert len(machines(one)) == len(machines(other)) == 1
    (spans,) = found["spans"]
    assert len(machines(spans)) == 2
    assert len(machines(spans[:1])) == 1  # the ranks of a host stay together
    (large,) = found["too large"]
    assert len(machines(large)) == 2


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_over_ray_whose_rank_is_killed_writes_the_bytes_of_one_without_ray(tmp_path):
    ray.cloudpickle.register_pickle_by_value(failpoints)  # workers cannot import the tests
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    base = {"model": str(make_divisible(tmp_path / "model")), "tensor_parallel": 2}
    run_job(job(prompts, tmp_path / "local", base), tmp_path)
    kill = KillAt(Failpoint.MID_STEP, tmp_path, 7)
    cluster = {"transport": "ray", "slots": 8}
    run, _ = run_job(job(prompts, tmp_path / "run", base, cluster=cluster), tmp_path, watch=kill)
    assert kill.has_killed
    assert run.is_complete
    assert parts(tmp_path / "run") == parts(tmp_path / "local")
    assert json.loads((tmp_path / "run/_manifest.json").read_text())["recoveries"]["hosts_failed"] == 1
