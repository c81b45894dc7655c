"""The main job with everything on S3: prompts, a principal's model, output, resume."""

from __future__ import annotations

import json

import fsspec
import pytest
from support.runs import job, parts, run_job, write_prompts
from support.storage import s3_server

from pipeline.storage.run import Run


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        store = fsspec.filesystem("s3")
        store.mkdir("jobs")
        yield store


def test_a_run_from_s3_to_s3_has_the_bytes_of_a_local_one(s3, tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    model = tiny("llama", seed=1)
    principals = {"arm": {"kind": "arm", "model": str(model), "reference": "none", "weight": 0.1}}
    run_job(job(prompts, tmp_path / "run", tiny(), principals=principals), tmp_path)

    s3.put(str(prompts), "jobs/prompts.jsonl")
    s3.put(str(model) + "/", "jobs/model/", recursive=True)
    principals["arm"]["model"] = "s3://jobs/model"
    config = job("s3://jobs/prompts.jsonl", "s3://jobs/run", tiny(), principals=principals)
    run, was_run = run_job(config, tmp_path)
    assert was_run
    stored = {path.rsplit("/", 1)[1]: s3.cat_file(path) for path in s3.glob("jobs/run/part-*.parquet")}
    assert stored == parts(tmp_path / "run")

    s3.rm("jobs/run/_SUCCESS")
    s3.rm("jobs/run/_commits/part-00001.json")
    again, was_run = run_job(config, tmp_path)
    assert was_run
    assert Run.open("s3://jobs/run").is_complete
    assert {path.rsplit("/", 1)[1]: s3.cat_file(path) for path in s3.glob("jobs/run/part-*.parquet")} == stored
    assert again.find("r2")[0]["response"] == run.find("r2")[0]["response"]
    assert json.loads(s3.cat_file("jobs/run/_manifest.json"))
