"""`cage retry`: only the failed rows, as a run of their own."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from support.runs import job, run_job, write_prompts

from jobs.commands.retry import WHERE_ROWS_ARE, retry_config
from pipeline.errors import ConfigurationError
from pipeline.storage.run import Run


def rows_of(run):
    return [row for path in sorted(run.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_failed_rows_that_fit_now_get_the_answers_they_would_have_had(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 5)
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    lines[1]["prompt"], lines[3]["prompt"] = None, "x" * 100
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small, large = tiny(seed=3, context=64), tiny(seed=3)
    first, _ = run_job(job(prompts, tmp_path / "run", small, errors={"budget": 2}), tmp_path)
    assert first.status().rows_failed == 2
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    config = retry_config(str(tmp_path / "run"), [f"base={large}"])
    again, _ = run_job(config, tmp_path)
    assert again.store.path == str(tmp_path / "run-retry")
    found = rows_of(tmp_path / "run-retry")
    assert [row["row_id"] for row in found] == ["r3"]  # r1 could not be read

    run_job(job(prompts, tmp_path / "whole", large, errors={"budget": 2}), tmp_path)
    expected = [row for row in rows_of(tmp_path / "whole") if row["row_id"] == "r3"]
    assert found == expected
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

    _, was_run = run_job(retry_config(str(tmp_path / "run"), [f"base={large}"]), tmp_path)
    assert not was_run


def test_what_cannot_be_tried_again_is_refused_with_the_reason(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    with pytest.raises(ConfigurationError, match="no failed row that can be tried again"):
        retry_config(str(tmp_path / "run"), [])
    (tmp_path / "run/_SUCCESS").unlink()
    assert not Run.open(str(tmp_path / "run")).is_complete
    with pytest.raises(ConfigurationError, match="is not complete"):
        retry_config(str(tmp_path / "run"), [])


def test_chosen_failed_rows_are_tried_alone(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 5)
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    for at in (1, 3, 4):
        lines[at]["prompt"] = "x" * 100
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small, large = tiny(seed=3, context=64), tiny(seed=3)
    run_job(job(prompts, tmp_path / "run", small, errors={"budget": 3}), tmp_path)
    path, overrides = str(tmp_path / "run"), [f"base={large}"]

    again, _ = run_job(retry_config(path, overrides, only=["r4", "r1"]), tmp_path)
    assert again.store.path.startswith(f"{path}-retry-")
    assert [row["row_id"] for row in rows_of(tmp_path / again.store.path)] == ["r1", "r4"]
    _, was_run = run_job(retry_config(path, overrides, only=["r1", "r4"]), tmp_path)
    assert not was_run  # the same choice, in whichever order, is the same run
    third, _ = run_job(retry_config(path, overrides, only=["r3"]), tmp_path)
    assert [row["row_id"] for row in rows_of(tmp_path / third.store.path)] == ["r3"]
    with pytest.raises(ConfigurationError, match="no failed row that can be tried again of the id 'r0', 'no such'"):
        retry_config(path, overrides, only=["r3", "r0", "no such"])


def test_a_retry_that_an_earlier_version_began_is_continued(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    prompts.write_text(prompts.read_text() + json.dumps({"id": "long", "prompt": "x" * 100}) + "\n")
    run_job(job(prompts, tmp_path / "run", tiny(seed=3, context=64), errors={"budget": 1}), tmp_path)
    config = retry_config(str(tmp_path / "run"), [])
    assert config.input.path.endswith("_input/failed.jsonl")
    (tmp_path / "run-retry/_input/failed.jsonl").rename(tmp_path / "run-retry/_input/rejected.jsonl")
    assert retry_config(str(tmp_path / "run"), []).input.path.endswith("_input/rejected.jsonl")
    assert not (tmp_path / "run-retry/_input/failed.jsonl").exists()


def test_what_rows_mean_holds_for_the_retry_too(tiny, tmp_path):
    """A key of the input that does not say where values are is kept."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "long", "prompt": "x" * 100}) + "\n")
    config = job(prompts, tmp_path / "run", tiny(context=64), errors={"budget": 1})
    run_job(config, tmp_path)
    again = retry_config(str(tmp_path / "run"), []).input
    kept = set(type(again).model_fields) - WHERE_ROWS_ARE
    assert {key: getattr(again, key) for key in kept} == {key: getattr(config.input, key) for key in kept}


def test_a_batch_request_keeps_its_parameters_and_tools(tiny, tmp_path):
    tool = {"type": "function", "function": {"name": "weather"}}
    own = {"max_tokens": 3, "seed": 9, "stop": ["zzz"], "tools": [tool]}
    requests = [
        {"custom_id": name, "body": {"messages": [{"role": "user", "content": text}], **own}}
        for name, text in (("short", "hello"), ("long", "x" * 100))
    ]
    prompts = tmp_path / "requests.jsonl"
    prompts.write_text("".join(json.dumps(request) + "\n" for request in requests))
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    small, large = tiny(seed=3, context=64), tiny(seed=3)

    def job_of(output, base):
        config = job(prompts, tmp_path / output, base, errors={"budget": 1}, input={"id": None})
        return config.model_copy(update={"base": config.base.model_copy(update={"chat_template": template})})

    run_job(job_of("run", small), tmp_path)
    run_job(retry_config(str(tmp_path / "run"), [f"base.model={large}"]), tmp_path)
    (found,) = rows_of(tmp_path / "run-retry")
    assert (found["row_id"], found["num_tokens"], json.loads(found["tools"])) == ("long", 3, [tool])
    run_job(job_of("whole", large), tmp_path)
    assert [row for row in rows_of(tmp_path / "whole") if row["row_id"] == "long"] == [found]
    prompts.unlink()
    with pytest.raises(ConfigurationError, match=r"requests\.jsonl does not exist any more"):
        retry_config(str(tmp_path / "run"), [])
