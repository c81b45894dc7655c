"""The main job with everything on S3: prompts, a principal's model, output, resume."""

from __future__ import annotations

import io
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import job, parts, run_job, write_prompts
from support.storage import s3_server

from pipeline.stages.retry import Retry, retry
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


def test_a_run_on_s3_is_extended_and_mended(s3, tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    lines = prompts.read_text().splitlines(keepends=True)
    s3.pipe("jobs/in/prompts.jsonl", "".join([lines[0], '{"id": "r1"}\n', *lines[2:4]]).encode())
    config = job("s3://jobs/in/prompts.jsonl", "s3://jobs/grown", tiny(), errors={"budget": 1})
    run_job(config, tmp_path)
    s3.pipe("jobs/in/prompts.jsonl", prompts.read_bytes())
    asked = Retry("s3://jobs/grown", mended="s3://jobs/in/prompts.jsonl")
    retry(asked, tmp_path / "cache", io.StringIO())
    run, _ = run_job(config, tmp_path, may_extend=True)
    assert run.is_complete
    expected = [row for data in parts(tmp_path / "run").values() for row in rows_in(data)]
    found = [row for path in sorted(s3.glob("jobs/grown/part-*")) for row in rows_in(s3.cat_file(path))]
    assert found == expected


def rows_in(data):
    return pq.read_table(pa.BufferReader(data)).to_pylist()
