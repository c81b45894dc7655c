"""The main job from file to files, in one process."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from support.runs import job, parts, run_job, write_prompts

from pipeline.errors import ConfigurationError, ErrorBudgetExceeded, RunMismatch
from pipeline.storage.run import Run


def test_every_prompt_is_answered_once_and_in_order(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    run, was_run = run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    assert was_run
    assert run.is_complete
    names = [f"part-0000{at}-of-00004.parquet" for at in range(4)]
    assert list(parts(tmp_path / "run")) == names
    rows = [row for name in names for row in pq.read_table(tmp_path / "run" / name).to_pylist()]
    assert [row["row_id"] for row in rows] == [f"r{at}" for at in range(11)]
    assert all(row["error"] is None and row["num_tokens"] > 0 for row in rows)
    assert rows[3]["messages"] == [*rows[3]["prompt"], {"role": "assistant", "content": rows[3]["response"]}]


def test_a_complete_run_is_left_alone(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    config = job(prompts, tmp_path / "run", tiny())
    run_job(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    _, was_run = run_job(config, tmp_path)
    assert not was_run
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_run_continues_where_it_stopped_and_ends_with_the_same_bytes(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    whole = job(prompts, tmp_path / "whole", tiny())
    run_job(whole, tmp_path)
    run_job(job(prompts, tmp_path / "broken", tiny()), tmp_path)
    broken = tmp_path / "broken"
    for name in ("_SUCCESS", "_manifest.json", "_commits/part-00001.json", "part-00001-of-00004.parquet"):
        (broken / name).unlink()
    (broken / "_commits/part-00002.json").unlink()  # its data file is there: written, then killed
    run, was_run = run_job(job(prompts, broken, tiny(), cluster={"slots": 7}), tmp_path)
    assert was_run
    assert run.is_complete
    assert parts(broken) == parts(tmp_path / "whole")


def test_a_run_of_another_configuration_is_refused_field_by_field(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    with pytest.raises(RunMismatch, match=r"decoding\.seed.*0.*7"):
        run_job(job(prompts, tmp_path / "run", tiny(), decoding={"seed": 7}), tmp_path)
    with pytest.raises(RunMismatch, match=r"models\.base|base"):
        run_job(job(prompts, tmp_path / "run", tiny(seed=1)), tmp_path)


def test_a_new_run_beside_one_of_other_settings_is_begun_when_it_is_asked_for(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    first = parts(tmp_path / "run")
    asked = [(7, "run-2", True), (8, "run-3", True), (0, "run", False), (7, "run-2", False)]
    for seed, place, is_new in asked:
        config = job(prompts, tmp_path / "run", tiny(), decoding={"seed": seed})
        run, was_run = run_job(config, tmp_path, may_begin_beside=True)
        assert (run.store.path, was_run) == (str(tmp_path / place), is_new)
    assert parts(tmp_path / "run") == first
    assert run.plan.config["output"]["path"] == str(tmp_path / "run-2")


def test_bad_rows_are_kept_apart_with_their_reasons(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    good = [json.dumps({"id": f"g{at}", "prompt": "hello"}).encode() for at in range(3)]
    bad = [b'{"id": "null", "prompt": null}', b'{"id": "empty", "prompt": ""}', b"\xff\xfe", b'{"id": "half", "pro']
    prompts.write_bytes(b"\n".join([good[0], bad[0], bad[1], good[1], bad[2], bad[3], good[2]]) + b"\n")
    config = job(prompts, tmp_path / "run", tiny(), errors={"budget": 4})
    run, _ = run_job(config, tmp_path)
    status = run.status()
    assert (status.rows_aligned, status.rows_failed) == (3, 4)
    aligned = load_dataset(
        "parquet", data_files=str(tmp_path / "run/part-*.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert aligned["row_id"] == ["g0", "g1", "g2"]
    failed = [row for path in sorted((tmp_path / "run/_failed").iterdir()) for row in pq.read_table(path).to_pylist()]
    reasons = {row["row_id"]: row["error"] for row in failed}
    assert all(row["finish_reason"] == "error" for row in failed)
    assert "null" in reasons["null"]
    assert "empty" in reasons["empty"]
    assert any("line 5" in reason and "UTF-8" in reason for reason in reasons.values())
    assert any("line 6" in reason for reason in reasons.values())


def test_more_bad_rows_than_the_budget_end_the_run_and_keep_what_is_done(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": str(at), "prompt": None if at % 2 else "hello"} for at in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = job(prompts, tmp_path / "run", tiny(), errors={"budget": 2})
    with pytest.raises(ErrorBudgetExceeded, match=r"errors\.budget allows 2"):
        run_job(config, tmp_path)
    done = len(Run.open(str(tmp_path / "run")).committed())
    assert 0 < done < 4
    run, _ = run_job(job(prompts, tmp_path / "run", tiny(), errors={"budget": "50%"}), tmp_path)
    assert run.is_complete


def test_rows_of_one_id_fail_by_name(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n')
    with pytest.raises(ErrorBudgetExceeded, match=r"2 x line 1 of prompts\.jsonl: id 'a' is the id of several rows"):
        run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)


def test_a_missing_column_is_refused_with_those_that_exist(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    with pytest.raises(ConfigurationError, match=r"question.*id.*prompt"):
        run_job(job(prompts, tmp_path / "run", tiny(), input={"prompt": "question"}), tmp_path)


def test_existing_answers_are_scored_and_preference_pairs_written(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": str(at), "prompt": "hello " * at + "?", "answer": f"answer {at}"} for at in range(5)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = job(prompts, tmp_path / "run", tiny(), input={"response": "answer"})
    run_job(config, tmp_path)
    written = [row for path in sorted((tmp_path / "run").glob("part-*")) for row in pq.read_table(path).to_pylist()]
    assert [row["original_response"] for row in written] == [row["answer"] for row in rows]
    for row in written:
        pair = {row["chosen"][0]["content"], row["rejected"][0]["content"]}
        assert pair == {row["response"], row["original_response"]}
        assert set(row["original_rewards"]) == {"kind", "brief"}


def test_weights_of_a_column_are_used_row_by_row(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "a", "prompt": "hi", "w": {"kind": 0.0}},
        {"id": "b", "prompt": "hi", "w": {"kind": 2, "brief": 1}},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, _ = run_job(job(prompts, tmp_path / "run", tiny(), input={"weights": "w"}), tmp_path)
    assert run.find("a")[0]["weights"] == {"kind": 0.0, "brief": 0.4}
    assert run.find("b")[0]["weights"] == {"kind": 2.0, "brief": 1.0}


def test_several_samples_of_a_prompt_are_rows_of_their_own(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    config = job(prompts, tmp_path / "run", tiny(), decoding={"n": 3, "temperature": 1.5, "agent_temperature": 4.0})
    run, _ = run_job(config, tmp_path)
    samples = run.find("r2")
    assert [row["sample"] for row in samples] == [0, 1, 2]
    assert len({row["response"] for row in samples}) > 1


def test_field_metadata_carries_the_fingerprint_and_the_models(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    run, _ = run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    schema = pq.read_schema(next((tmp_path / "run").glob("part-*")))
    assert schema.metadata[b"cage.fingerprint"].decode() == run.plan.digest
    assert any(key.startswith(b"cage.models.base") for key in schema.metadata)
    assert (tmp_path / "run/_README.md").read_text().startswith("---\n")
