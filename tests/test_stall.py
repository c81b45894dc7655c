"""A run in which nothing happens for the stated time ends and says what it was waiting for."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from support import failpoints
from support.failpoints import Failpoint, Hang
from support.runs import job, parts, run_job, write_prompts

from pipeline.errors import ExitCode, RunStalled
from pipeline.monitoring.stall import ended_when_stalled
from pipeline.monitoring.waits import waiting_for, waits


def test_progress_of_any_kind_keeps_a_block_going():
    started_s = time.monotonic()
    with ended_when_stalled(0.3, lambda: int((time.monotonic() - started_s) * 10), list):
        time.sleep(0.9)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert not [thread for thread in threading.enumerate() if thread.name == "stall"]


def test_a_block_without_progress_is_ended_with_all_that_is_waited_for():
    with (
        pytest.raises(RunStalled, match=r"for 0\.2 s .*for: one \(0 s\); two; 3; 4; and 2 more\. What is") as raised,
        ended_when_stalled(0.2, lambda: 0, lambda: [*waits(), "two", "3", "4", "5", "6"]),
        waiting_for("one"),
    ):
        time.sleep(3600)
    assert raised.value.exit_code == ExitCode.FAILED
    assert waits() == []


def test_waits_are_reported_by_thread_and_end():
    with waiting_for("outer"):
        with waiting_for("inner"):
            assert [wait.partition(" (")[0] for wait in waits()] == ["inner"]
        assert [wait.partition(" (")[0] for wait in waits()] == ["outer"]
    assert waits() == []


@pytest.mark.parametrize(
    ("point", "awaited"),
    [
        (Failpoint.MID_STEP, "an answer of host base to advance"),
        (Failpoint.BEFORE_DATA, "the commit of shard 0"),
        (Failpoint.BEFORE_MANIFEST, "the end of the run in"),
    ],
)
def test_a_run_that_stands_still_is_ended_and_goes_on_later(tiny, tmp_path, point, awaited):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    stalling = job(prompts, tmp_path / "run", tiny(), cluster={"stall_timeout_s": 0.5})
    with pytest.raises(RunStalled, match=f"waiting for: {awaited}"):
        run_job(stalling, tmp_path, watch=Hang(point))
    run, _ = run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    assert run.is_complete
    run_job(job(prompts, tmp_path / "whole", tiny()), tmp_path)
    assert parts(tmp_path / "run") == parts(tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster", "awaited"),
    [
        # long enough for a slow machine to start a replica; the board is waited for on a very slow one
        pytest.param(
            {"stall_timeout_s": 20}, r"waiting for: (.+ \(\d+ s\)|the progress board)", marks=pytest.mark.nightly
        ),
        (
            {"stall_timeout_s": 8, "coordinator_cpus": 1000},
            r"waiting for: (starting a replica \(1000 CPU|the progress board)",
        ),
    ],
)
def test_a_run_over_ray_that_stands_still_says_who_waits_for_whom(ray_cluster, tiny, tmp_path, cluster, awaited):
    import ray

    ray.cloudpickle.register_pickle_by_value(failpoints)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    config = job(prompts, tmp_path / "run", tiny(), cluster={"transport": "ray", **cluster})
    with pytest.raises(RunStalled, match=awaited):
        run_job(config, tmp_path, watch=Hang(Failpoint.MID_STEP))
