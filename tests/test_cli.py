"""The command line as a user meets it: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from support import tiny_models
from support.commands import ROOT, cage


@pytest.fixture
def config(tiny, tmp_path):
    """A small job in one process; its file, and its run folder."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"r{at}", "prompt": "hi " * at + "!"}) + "\n" for at in range(5)))
    tree = {
        "input": {"path": str(prompts), "id": "id"},
        "output": {"path": str(tmp_path / "run"), "rows_per_shard": 2},
        "base": str(tiny()),
        "principals": {"kind": {"kind": "prompted", "principle": "be kind", "weight": 0.5}},
        "decoding": {"max_new_tokens": 5, "trace": "tokens"},
        "cluster": {"transport": "local", "slots": 4},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path, tmp_path / "run"


def test_a_run_is_planned_made_described_and_inspected(config):
    path, run = config
    planned = cage("plan", "-c", str(path))
    assert planned.returncode == 0, planned.stderr
    for words in ("5 rows", "3 shards", "log p[kind] - log p[base]", "KV cache", "base, kind"):
        assert words in planned.stdout
    assert not run.exists()

    made = cage("-c", str(path), module=("-m", "jobs.relabel"))
    assert made.returncode == 0, made.stderr
    assert "5 aligned, 0 failed" in made.stdout
    assert "5/5 rows  3/3 shards" in made.stderr

    again = cage("relabel", "-c", str(path))
    assert again.returncode == 0
    assert "nothing to do" in again.stdout

    status = cage("status", str(run))
    assert status.returncode == 0
    assert "complete" in status.stdout
    inspected = cage("inspect", str(run), "r3")
    assert inspected.returncode == 0
    for words in ("hi hi hi !", "paid by kind", "KL to the base"):
        assert words in inspected.stdout


def test_print_config_shows_every_default_and_loads_again(config, tmp_path):
    path, run = config
    printed = cage("relabel", "-c", str(path), "decoding.temperature=0.25", "--seed", "9", "--print-config")
    assert printed.returncode == 0
    tree = yaml.safe_load(printed.stdout)
    assert tree["decoding"]["temperature"] == 0.25
    assert tree["decoding"]["seed"] == 9
    assert tree["errors"]["budget"] == "5%"
    (tmp_path / "again.yaml").write_text(printed.stdout)
    assert cage("relabel", "-c", str(tmp_path / "again.yaml"), "--print-config").stdout == printed.stdout
    assert not run.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decodng.seed=1", "did you mean decoding"),
        ("decoding.temperature=-1", "decoding.temperature must be greater than or equal to 0; got -1"),
        ("decoding.rule=nash", "decoding.rule"),
        ("principals.kind.kind=prompt", "principals.kind.kind must be one of prompted, arm"),
        ("principals.kind.principal=x", "did you mean principle"),
        ("input.path=/no/such/file.jsonl", "/no/such/file.jsonl"),
        ("base.model=/no/such/model", "/no/such/model"),
        ("cluster.slots", "key.sub=value"),
        ("errors.budget=lots", "5%"),
        ("input.id=prompt_id", "prompt_id"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_nothing_is_written(config, change, message):
    path, run = config
    result = cage("relabel", "-c", str(path), change)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not run.exists()


def test_the_input_is_looked_at_before_the_models(config):
    path, _ = config
    result = cage("relabel", "-c", str(path), "input.path=/no/input.jsonl", "base.model=/no/model")
    assert result.returncode == 2
    assert "/no/input.jsonl" in result.stderr
    assert "/no/model" not in result.stderr


def test_another_vocabulary_beside_all_candidates_is_refused_before_a_run_is_created(config, tmp_path):
    path, run = config
    tokenizer = tiny_models.make_tokenizer(extra=("<extra>",))
    other = tiny_models.make_model(tmp_path / "other", tokenizer=tokenizer)
    result = cage("relabel", "-c", str(path), f"principals.kind.model={other}", "decoding.candidates=all")
    assert result.returncode == 2
    assert "candidates: all needs models with the base's tokens" in result.stderr
    assert not run.exists()


def test_too_many_bad_rows_exit_with_3(config, tmp_path):
    path, run = config
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": null}\n{"id": "b", "prompt": "hello"}\n')
    result = cage("relabel", "-c", str(path), "errors.budget=0")
    assert result.returncode == 3
    assert "errors.budget" in result.stderr
    assert run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(config, tmp_path, number):
    path, run = config
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": f"r{at}", "prompt": "hi"}) + "\n" for at in range(150))
    )
    command = [sys.executable, "-m", "jobs", "relabel", "-c", str(path), "output.rows_per_shard=1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(run.glob("_commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr
    done = len(list(run.glob("_commits/*.json")))
    assert 0 < done < 150
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
    assert finished.returncode == 0, finished.stderr
    assert len(list(run.glob("part-*.parquet"))) == 150


@pytest.mark.parametrize("job", ["relabel", "evaluate", "synthesize", "train"])
def test_each_job_is_a_module_too(job):
    shown = cage("--help", module=("-m", f"jobs.{job}"))
    assert shown.returncode == 0
    assert "Usage: python -m jobs" in shown.stdout
    assert "--config" in shown.stdout


def test_help_needs_no_heavy_import():
    script = "import sys, jobs.cli; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT, env={**os.environ}).returncode == 0
    shown = cage("--help")
    assert shown.returncode == 0
    for words in ("relabel", "plan", "status", "inspect", "report", "fetch", "75 interrupted"):
        assert words in shown.stdout


def test_control_characters_in_data_are_not_echoed(tiny, config, tmp_path):
    path, run = config
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": "a\x1b[31m", "prompt": "red \x1b[31m alert"}) + "\n")
    assert cage("relabel", "-c", str(path)).returncode == 0
    shown = cage("inspect", str(run), "a\x1b[31m")
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    assert "red \\x1b[31m alert" in shown.stdout
