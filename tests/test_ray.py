"""The main job over Ray: the same bytes as in one process, and what happens when a host fails."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file, save_file
from support import failpoints
from support.failpoints import DiskFull, Failpoint, KillAlways, KillAt, KillSibling, Poison
from support.families import make_family
from support.runs import job, parts, run_job, write_prompts
from transformers import AutoTokenizer

from jobs.commands.status import describe_status
from pipeline.cluster.stream import ShardStream
from pipeline.config.sections import Transport
from pipeline.errors import CageError, ConfigurationError, HostError, StorageError
from pipeline.runtime.assembly import assemble
from pipeline.stages.retry import Retry, retry

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


ray.cloudpickle.register_pickle_by_value(failpoints)  # workers cannot import the tests


def on_ray(**cluster):
    return {"transport": "ray", "slots": 8, **cluster}


def in_one_process(config):
    """The same job; where it runs is no part of its fingerprint, and starting Ray's processes takes half a minute."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"transport": Transport.LOCAL})})


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


@pytest.mark.parametrize("kills", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_two_replicas_write_the_bytes_of_one_process_also_where_a_host_is_killed(tiny, tmp_path, reference, kills):
    """Also where passes verify drafts, of texts and of a model in the coordinator's process."""
    prompts, expected = reference
    drafts = {"draft": ["lookup", "model"], "draft_model": str(tiny())}
    sections = {"cluster": on_ray(replicas=2), "decoding": drafts, **two_hosts(tiny)}
    config = job(prompts, tmp_path / "run", tiny(), **sections)
    kill = KillAt(Failpoint.MID_STEP, tmp_path, 7)
    run, _ = run_job(config, tmp_path, watch=kill if kills else None)
    assert run.is_complete
    assert parts(tmp_path / "run") == expected
    assert len({record.host for record in run.committed().values()}) == 2
    assert kill.has_killed == kills
    if not kills:
        return
    assert {record.attempt for record in run.committed().values()} == {1}
    assert json.loads((tmp_path / "run/_manifest.json").read_text())["recoveries"]["hosts_failed"] == 1
    assert "overcome  hosts replaced 1\n" in describe_status(run)


@pytest.mark.nightly
def test_a_coordinator_that_is_killed_is_replaced_and_nothing_changes(tiny, tmp_path, reference):
    prompts, expected = reference
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(), **two_hosts(tiny))
    kill = KillAt(Failpoint.AFTER_DATA, tmp_path, 2)
    run, _ = run_job(config, tmp_path, watch=kill)
    assert kill.has_killed
    assert parts(tmp_path / "run") == expected
    assert "attempts of shards lost" in describe_status(run)


@pytest.mark.nightly
def test_a_run_whose_board_is_killed_ends_in_one_line_and_the_same_command_continues(tiny, tmp_path, reference):
    prompts, expected = reference
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(), **two_hosts(tiny))
    with pytest.raises(CageError, match="the progress board, on the driver's machine, does not answer: ") as raised:
        run_job(config, tmp_path, watch=KillSibling("ray::ProgressBoard", Failpoint.AFTER_COMMIT, tmp_path))
    assert "\n" not in str(raised.value)
    run, _ = run_job(in_one_process(config), tmp_path)
    assert run.is_complete
    assert parts(tmp_path / "run") == expected


@pytest.mark.nightly
def test_a_shard_whose_replica_dies_each_time_is_given_up(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(), errors={"max_attempts": 2})
    with pytest.raises(HostError, match="shard 0 was given up after 2 attempts: its replica died each time"):
        run_job(config, tmp_path, watch=KillAlways(Failpoint.BEFORE_DATA))
    run, _ = run_job(in_one_process(config), tmp_path)
    assert run.is_complete


@pytest.mark.nightly
def test_a_full_disk_in_a_replica_ends_the_run_in_one_line_and_the_same_command_continues(tiny, tmp_path, reference):
    prompts, expected = reference
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(), **two_hosts(tiny))
    with pytest.raises(
        StorageError, match=r"cannot write .*part-0.*No space left on device \(tried 4 times"
    ) as raised:
        run_job(config, tmp_path, watch=DiskFull(10**6))
    assert "\n" not in str(raised.value)
    run_job(in_one_process(config), tmp_path)
    assert parts(tmp_path / "run") == expected


def test_a_cluster_on_this_machine_knows_its_user_by_a_token():
    script = "import ray, sys; ray.init(address=sys.argv[1], logging_level='CRITICAL')"
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_NUM_REDIS_GET_RETRIES": "1"}
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, None):
        result = subprocess.run(
            [sys.executable, "-c", script, address],
            env={**environment, **(stranger or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ("Failed to connect" in result.stderr) == (stranger is not None), result.stderr


@pytest.mark.nightly
def test_shards_that_another_driver_committed_are_not_decoded_again(tiny, tmp_path, reference):
    prompts, _ = reference
    config = job(prompts, tmp_path / "run", tiny(), **two_hosts(tiny))
    run, _ = run_job(config, tmp_path)
    (tmp_path / "run/_commits/part-00003.json").unlink()
    stream = ShardStream(assemble(config, tmp_path / "cache"), run.store.path)
    outcomes = {outcome.index: outcome for outcome in stream.decode(range(6))}
    assert {index for index, outcome in outcomes.items() if not outcome.was_committed} == {3}
    assert [outcomes[index].rows for index in range(6)] == [3, 3, 3, 3, 3, 2]
    assert stream.counts().rows == 3


@pytest.mark.nightly
def test_a_row_that_kills_its_host_is_failed_and_its_neighbours_are_not(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 5)
    run_job(job(prompts, tmp_path / "whole", tiny()), tmp_path)
    lines = prompts.read_text().splitlines()
    lines[3] = json.dumps({"id": "r3", "prompt": "a ! kills"})
    prompts.write_text("\n".join(lines) + "\n")
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(slots=2), errors={"budget": 1})
    (token,) = AutoTokenizer.from_pretrained(tiny())("!", add_special_tokens=False)["input_ids"]
    run, _ = run_job(config, tmp_path, watch=Poison(token))
    status = run.status()
    assert (status.rows_aligned, status.rows_failed) == (4, 1)
    (row,) = run.find("r3")
    assert "its host failed whenever it was decoded" in row["error"]
    assert "serving base, kind, brief" in row["error"]
    rows, expected = rows_of(tmp_path / "run"), rows_of(tmp_path / "whole")
    assert rows == [row for row in expected if row["row_id"] != "r3"]


def rows_of(folder):
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_model_that_its_host_cannot_serve_ends_the_run_with_the_principal_and_the_reason(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    folder = make_family(tmp_path / "model", "phi3")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    principals = {"arm": {"kind": "arm", "model": str(folder), "reference": "none"}}
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(), principals=principals)
    with pytest.raises(ConfigurationError, match=r"for arm.*lm_head.*random"):
        run_job(config, tmp_path)


def test_a_replica_that_no_machine_can_hold_is_refused(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    base = {"model": str(tiny()), "resources": {"num_cpus": 64}}
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray())
    config = config.model_copy(update={"base": config.base.model_validate(base)})
    with pytest.raises(ConfigurationError, match=r"needs 64 CPU"):
        run_job(config, tmp_path)


@pytest.mark.nightly
def test_a_run_on_ray_is_extended_and_mended(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    run_job(job(prompts, tmp_path / "whole", tiny()), tmp_path)
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join([lines[0], '{"id": "r1"}\n', *lines[2:4]]))
    config = job(prompts, tmp_path / "run", tiny(), cluster=on_ray(), errors={"budget": 1})
    run_job(in_one_process(config), tmp_path)
    prompts.write_text("".join(lines))
    asked = Retry(str(tmp_path / "run"), ("cluster.transport=ray", "cluster.slots=8"), mended=str(prompts))
    retry(asked, tmp_path / "cache", io.StringIO())
    run, _ = run_job(config, tmp_path, may_extend=True)
    assert run.is_complete
    whole, found = (
        [row for path in sorted((tmp_path / name).glob("part-*")) for row in pq.read_table(path).to_pylist()]
        for name in ("whole", "run")
    )
    assert found == whole
