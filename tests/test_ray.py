"""The main job over Ray: the same bytes as in one process, and what happens when a host fails."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest
from test_relabel import job, parts, run_job, write_prompts

from pipeline.errors import ConfigurationError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def on_ray(**cluster):
    return {"transport": "ray", "slots": 8, **cluster}


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """Prompts, and the files that one process makes of them."""
    folder = tmp_path_factory.mktemp("reference")
    prompts = write_prompts(folder / "prompts.jsonl", 17)
    run_job(job(prompts, folder / "run", tiny(), **two_hosts(tiny)), folder)
    return prompts, parts(folder / "run")


def two_hosts(tiny):
    """A second host, so that candidates and rewards cross processes."""
    arm = {"kind": "arm", "model": str(tiny("llama", seed=5)), "reference": "none", "weight": 0.1}
    return {"principals": {"kind": {"kind": "prompted", "principle": "be kind", "weight": 0.5}, "arm": arm}}


@pytest.mark.parametrize("replicas", [1, 2])
def test_ray_writes_the_bytes_of_one_process(tiny, tmp_path, reference, replicas):
    prompts, expected = reference
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(replicas=replicas), **two_hosts(tiny))
    run, _ = run_job(config, tmp_path)
    assert parts(tmp_path / "run") == expected
    hosts = {record.host for record in run.committed().values()}
    assert len(hosts) == replicas


def test_a_killed_host_is_replaced_and_nothing_changes(tiny, tmp_path, reference):
    prompts, expected = reference
    killed = []

    def kill_a_host_once_something_is_committed():
        deadline = time.monotonic() + 240
        while not list((tmp_path / "run/_commits").glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        killed.extend(host.pid for host in host_processes()[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_a_host_once_something_is_committed)
    thread.start()
    # one slot: the rows come one after another, so that most are still to come when the host dies
    run, _ = run_job(job(prompts, tmp_path / "run", tiny(), cluster=on_ray(slots=1), **two_hosts(tiny)), tmp_path)
    thread.join()
    assert killed
    assert run.is_complete
    assert parts(tmp_path / "run") == expected
    assert max(record.attempt for record in run.committed().values()) == 2


def host_processes() -> list[psutil.Process]:
    """The host actors of this test run's own cluster."""
    workers = psutil.Process().children(recursive=True)
    return [worker for worker in workers if any("HostActor" in word for word in worker.cmdline())]


def test_a_model_that_its_host_cannot_serve_ends_the_run_with_the_principal_and_the_reason(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    principals = {"arm": {"kind": "arm", "model": str(tiny("gemma2")), "reference": "none"}}
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(), principals=principals)
    with pytest.raises(ConfigurationError, match=r"for arm.*gemma2.*softcap"):
        run_job(config, tmp_path)


def test_a_replica_that_no_machine_can_hold_is_refused(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    base = {"model": str(tiny()), "resources": {"num_cpus": 64}}
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray())
    config = config.model_copy(update={"base": config.base.model_validate(base)})
    with pytest.raises(ConfigurationError, match=r"needs 64 CPU"):
        run_job(config, tmp_path)
