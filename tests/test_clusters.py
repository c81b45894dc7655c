"""Runs on clusters of machines that share no file system, as `infra/` starts them: grown, drained, without a head."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fsspec
import pytest
import yaml
from support.ray_machines import Machines, has_namespaces
from support.runs import job, parts, run_job, write_prompts
from support.storage import s3_server

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not has_namespaces(), reason="needs mount namespaces (unshare)"),
]

ROOT = Path(__file__).parent.parent
PATIENCE_S = 900.0
ROWS = 240
DECODING = {"max_new_tokens": 24, "trace": "summary"}


def until(holds, process):
    """Wait for something to hold while a command runs."""
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        if process.poll() is not None:
            raise AssertionError(f"the command ended with {process.returncode}: {process.stdout.read()}")
        assert time.monotonic() < end_s
        time.sleep(0.3)


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        store = fsspec.filesystem("s3")
        store.mkdir("clusters")
        yield store


@pytest.fixture(scope="module")
def expected(tiny, s3, tmp_path_factory):
    """Uploads the model and the prompts; the files that one process makes of them."""
    folder = tmp_path_factory.mktemp("expected")
    prompts = write_prompts(folder / "prompts.jsonl", ROWS)
    s3.put(str(prompts), "clusters/prompts.jsonl")
    s3.put(str(tiny()) + "/", "clusters/model/", recursive=True)
    run_job(job(prompts, folder / "run", tiny(), decoding=DECODING), folder)
    return parts(folder / "run")


@pytest.fixture
def machines(s3, tmp_path_factory):
    found = Machines(hidden=(tmp_path_factory.getbasetemp(),))
    try:
        found.start_head()
        found.add("one", "127.0.0.2", num_cpus=2)
        yield found
    finally:
        found.stop()


def configured(machines, name):
    """A configuration on the head's machine, which no other can see: everything it names is on S3."""
    base = {"model": "s3://clusters/model", "resources": {"num_cpus": 1.5}}  # a machine of 2 CPUs has one replica
    cluster = {
        "transport": "ray", "slots": 2, "replicas": {"min": 1, "max": 2}, "address": machines.address,
    }  # fmt: skip
    config = job("s3://clusters/prompts.jsonl", f"s3://clusters/{name}", "x", decoding=DECODING, cluster=cluster)
    tree = {**config.model_dump(mode="json", exclude_unset=True), "base": base}
    file = machines.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))  # the order of principals is that of sums
    return file


def commits(s3, name):
    """The commit records of a run, by shard."""
    s3.invalidate_cache()
    return [json.loads(s3.cat_file(path)) for path in s3.glob(f"clusters/{name}/_commits/*.json")]


def stored(s3, name):
    s3.invalidate_cache()
    return {path.rsplit("/", 1)[1]: s3.cat_file(path) for path in s3.glob(f"clusters/{name}/part-*.parquet")}


def relabel(machines, file):
    return machines.run([sys.executable, "-m", "jobs", "relabel", "-c", str(file), "--log-format", "json"])


def test_a_run_grows_with_its_cluster_and_goes_on_when_a_machine_is_drained(s3, expected, machines):
    driver = relabel(machines, configured(machines, "elastic"))
    until(lambda: commits(s3, "elastic"), driver)
    machines.add("two", "127.0.0.3", num_cpus=2)
    nodes = machines.nodes()
    one, two = nodes["127.0.0.2"], nodes["127.0.0.3"]
    until(lambda: any(record["host"].startswith(two[:8]) for record in commits(s3, "elastic")), driver)
    assert any(record["host"].startswith(one[:8]) for record in commits(s3, "elastic"))
    machines.drain(one)
    log, _ = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, log
    assert stored(s3, "elastic") == expected
    [result] = [json.loads(line) for line in log.splitlines() if '"event": "result"' in line]
    assert (result["is_complete"], result["aligned"]) == (True, ROWS)
    assert {record["attempt"] for record in commits(s3, "elastic")} == {1}  # what it was decoding was finished
    driver_files = {path.name for path in machines.folder.rglob("model.safetensors")}
    assert not driver_files  # machines fetched the model by themselves


def test_a_head_that_is_lost_and_started_again_finds_the_run_as_it_was(s3, expected, machines):
    file = configured(machines, "headless")
    driver = relabel(machines, file)
    until(lambda: len(commits(s3, "headless")) >= 2, driver)
    machines.lose("head")
    log, _ = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode not in (0, 2, 3), log  # a code after which infra/retry.sh tries again
    machines.lose("one")
    before = {path: s3.info(path)["ETag"] for path in s3.glob("clusters/headless/part-*.parquet")}
    machines.start_head()
    machines.add("one", "127.0.0.2", num_cpus=2)
    entrypoint = ["sh", str(ROOT / "infra/retry.sh"), "4", sys.executable, "-m", "jobs", "relabel", "-c"]
    again = machines.run([*entrypoint, str(configured(machines, "headless"))], RETRY_WAIT_S="1")
    log, _ = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, log
    assert stored(s3, "headless") == expected
    s3.invalidate_cache()
    assert (
        before.items()
        <= {path: s3.info(path)["ETag"] for path in s3.glob("clusters/headless/part-*.parquet")}.items()
    )
