"""`cage plan` says what is at `output.path` already, and `cage inspect` where a failed row is from."""

from __future__ import annotations

import pytest
from support.runs import job, run_job, write_prompts

from jobs.commands.inspect import describe_row
from jobs.commands.plan_run import describe_existing
from pipeline.stages.relabel import prepare


def said(config, tmp_path):
    lines = describe_existing(config.output.path, prepare(config, tmp_path / "cache").plan)
    assert len(lines) <= 1
    return "".join(lines).partition("run ")[2]


def test_the_plan_says_how_it_stands_to_the_run_that_is_there(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    trial, whole = (job(prompts, tmp_path / "run", tiny(), input={"limit": limit}) for limit in (4, None))
    assert not said(whole, tmp_path)
    run_job(trial, tmp_path)
    assert said(trial, tmp_path).endswith("is complete")
    assert said(whole, tmp_path).endswith("has 4 of these rows; relabel goes on with 3 more (input.limit)")
    run, _ = run_job(whole, tmp_path)
    (tmp_path / "run/_SUCCESS").unlink()
    (tmp_path / "run/_commits/part-00001.json").unlink()
    assert said(whole, tmp_path).endswith(f"is begun: 1 of {len(run.plan.shards)} shards are left")
    write_prompts(prompts, 9)
    assert said(whole, tmp_path).endswith("has 7 rows; if the input has only grown, --extend answers the other 2")
    other = job(prompts, tmp_path / "run", tiny(), decoding={"seed": 3})
    assert "holds a run with other settings (decoding.seed, input.files.prompts.jsonl)" in said(other, tmp_path)
    (tmp_path / "run/_plan.1.json").write_text("{")
    assert "is not a plan of this program" in said(whole, tmp_path)


@pytest.mark.parametrize("given", ['{"id": "r0", "prompt": null}', "x" * 5000])
def test_a_failed_row_is_shown_with_its_place_and_what_it_was_given(tmp_path, given):
    failed = {"row_id": "r0", "sample": 0, "prompt": [], "error": "line 1 of p.jsonl: prompt is null"}
    text = describe_row({**failed, "input_file": "p.jsonl", "input_row": 1, "given": given})
    assert "failed: line 1 of p.jsonl: prompt is null\ninput: p.jsonl, row 1\ngiven:\n  " in text
    assert len(text) < 2300
    assert describe_row(failed).endswith("prompt is null")  # of an earlier version
