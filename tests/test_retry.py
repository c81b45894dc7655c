"""`cage retry`: only the rejected rows, as a run of their own."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from support.runs import job, run_job, write_prompts

from jobs.commands.retry import retry_config
from pipeline.errors import ConfigurationError
from pipeline.storage.run import Run


def rows_of(run):
    return [row for path in sorted(run.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_rejected_rows_that_fit_now_get_the_answers_they_would_have_had(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 5)
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    lines[1]["prompt"], lines[3]["prompt"] = None, "x" * 100
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small, large = tiny(seed=3, context=64), tiny(seed=3)
    first, _ = run_job(job(prompts, tmp_path / "run", small, errors={"budget": 2}), tmp_path)
    assert first.status().rows_rejected == 2
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
    with pytest.raises(ConfigurationError, match="no rejected row that can be tried again"):
        retry_config(str(tmp_path / "run"), [])
    (tmp_path / "run/_SUCCESS").unlink()
    assert not Run.open(str(tmp_path / "run")).is_complete
    with pytest.raises(ConfigurationError, match="is not complete"):
        retry_config(str(tmp_path / "run"), [])
