"""A run in which too much fails ends with the reasons, the rows and what to do; at once where nothing can succeed."""

from __future__ import annotations

import io
import json
import time

import pytest
from support.runs import job, run_job

from jobs.commands.status import describe_status
from pipeline.errors import CageError, ErrorBudgetExceeded
from pipeline.monitoring.stall import ended_when_stalled
from pipeline.runtime.wiring import Wiring
from pipeline.stages.relabel import relabel
from pipeline.storage.run import Run


def write_rows(path, prompts):
    rows = [{"id": f"r{at}", "prompt": prompt} for at, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def big_shards(tmp_path, rows, base, **sections):
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    config = job(prompts, tmp_path / "run", base, **sections)
    return config.model_copy(update={"output": config.output.model_copy(update={"rows_per_shard": 20})})


def test_a_run_whose_rows_all_fail_for_one_reason_ends_early_with_it(tiny, tmp_path):
    config = big_shards(tmp_path, [None] * 200, tiny(), errors={"budget": "50%"})
    with pytest.raises(ErrorBudgetExceeded) as caught:
        run_job(config, tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / 'run'}: no row was answered and all " in message
    assert "prompt is null (rows r0, r1, r2, ...)" in message
    assert "errors.stop_when_all_fail=null" in message
    assert len(Run.open(config.output.path).committed()) < 10


@pytest.mark.parametrize(
    ("errors", "is_early"),
    [
        ({"budget": 190}, True),
        ({"budget": 190, "stop_when_all_fail": None}, False),
        ({"budget": "100%"}, False),
        ({"budget": 200}, False),
    ],
)
def test_it_ends_early_unless_the_configuration_allows_all_to_fail(tiny, tmp_path, errors, is_early):
    config = big_shards(tmp_path, [None] * 200, tiny(), errors=errors)
    if is_early:
        with pytest.raises(ErrorBudgetExceeded, match="for one reason"):
            run_job(config, tmp_path)
    elif errors["budget"] == 190:
        with pytest.raises(ErrorBudgetExceeded, match=r"200 answers failed and errors\.budget allows 190"):
            run_job(config, tmp_path)
    else:
        assert run_job(config, tmp_path)[0].is_complete


@pytest.mark.parametrize(
    "prompts",
    [
        [None] * 7 + ["hello"] * 13,  # fewer than 8 say nothing
        ["hello"] + [None] * 19,  # one was answered
        [None, ""] * 10,  # for two reasons
    ],
)
def test_other_failures_are_a_matter_of_the_budget_alone(tiny, tmp_path, prompts):
    config = big_shards(tmp_path, prompts, tiny(), errors={"budget": 19}, decoding={"max_new_tokens": 1})
    num_failed = sum(not prompt for prompt in prompts)
    if num_failed <= 19:
        assert run_job(config, tmp_path)[0].status().rows_failed == num_failed
    else:
        with pytest.raises(ErrorBudgetExceeded, match=r"errors\.budget allows 19"):
            run_job(config, tmp_path)


def test_the_budgets_end_names_the_run_the_reasons_the_rows_and_the_way_on(tiny, tmp_path):
    prompts = ["hello", None, "", None, "hello", "", None, "x" * 900, "hello"]
    config = big_shards(tmp_path, prompts, tiny(), errors={"budget": 2})
    with pytest.raises(ErrorBudgetExceeded) as caught:
        run_job(config, tmp_path)
    head, *reasons, way_on = str(caught.value).splitlines()
    assert head.startswith(f"{tmp_path / 'run'}: 6 answers failed and errors.budget allows 2; what is done is kept")
    assert [reason.strip()[:3] for reason in reasons] == ["3 x", "2 x", "1 x"]
    assert reasons[0].endswith("line 2 of prompts.jsonl: prompt is null (rows r1, r3, r6)")
    assert reasons[2].endswith("(rows r7)")
    assert "errors.budget=6 or more" in way_on
    assert f"cage retry {tmp_path / 'run'}" in way_on
    run, _ = run_job(config.model_copy(update={"errors": config.errors.model_copy(update={"budget": 6})}), tmp_path)
    assert run.is_complete


def test_a_resume_that_is_over_its_budget_says_so_before_it_starts_anything(tiny, tmp_path):
    prompts = ["hello", None] * 4
    config = job(write_rows(tmp_path / "prompts.jsonl", prompts), tmp_path / "run", tiny(), errors={"budget": 1})
    with pytest.raises(ErrorBudgetExceeded) as first:
        run_job(config, tmp_path)

    def must_not_start(host):
        raise AssertionError("a host was started")

    out = io.StringIO()
    with pytest.raises(ErrorBudgetExceeded) as again:
        relabel(config, tmp_path / "cache", out, wiring=Wiring(wrap_host=must_not_start))
    assert str(again.value) == str(first.value)
    assert out.getvalue() == ""


def test_status_shows_reasons_whole(tiny, tmp_path):
    row = {"id": "a", "prompt": "hi", "w": {"kindness_with_a_long_name": 1.0}}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    config = job(tmp_path / "prompts.jsonl", tmp_path / "run", tiny(), input={"weights": "w"}, errors={"budget": 1})
    run, _ = run_job(config, tmp_path)
    reason = "weights name the unknown principal 'kindness_with_a_long_name'; principals: kind, brief (rows a)"
    assert any(line.endswith(reason) for line in describe_status(run).splitlines())


def test_an_error_that_is_found_while_the_run_waits_ends_it():
    found = CageError("all fail")
    with pytest.raises(CageError) as caught, ended_when_stalled(0.4, time.monotonic, list, find_error=lambda: found):
        time.sleep(30)
    assert caught.value is found
