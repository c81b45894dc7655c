"""Secrets of the environment and of addresses are in nothing that a run writes or says."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from support.commands import cage
from support.runs import job, write_prompts

from pipeline.config.files import dump_config, parse_as
from pipeline.errors import ConfigurationError
from pipeline.evaluation.config import EvaluateConfig

SECRET = "planted-7f3a9c51e2"


@pytest.fixture
def planted(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)


def test_a_run_writes_and_says_no_secret_of_its_environment(tiny, tmp_path, planted):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    file = tmp_path / "job.yaml"
    file.write_text(dump_config(job(prompts, tmp_path / "run", tiny())))
    made = cage("relabel", "-c", str(file), "-v")
    assert made.returncode == 0, made.stderr
    shown = cage("status", str(tmp_path / "run"))
    assert SECRET not in made.stdout + made.stderr + shown.stdout + shown.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
def test_a_run_over_ray_leaves_no_secret_with_ray_either(tiny, tmp_path, planted, monkeypatch):
    """Neither in the run directory nor in what Ray keeps on disk: logs, job tables, environments of workers."""
    monkeypatch.delenv("RAY_AUTH_TOKEN")  # this one is Ray's own, and none of another length starts a cluster
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    file = tmp_path / "job.yaml"
    file.write_text(dump_config(job(prompts, tmp_path / "run", tiny(), cluster={"transport": "ray"})))
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # the path of a socket must be short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        made = cage("relabel", "-c", str(file), "-v")
        assert made.returncode == 0, made.stderr
        assert SECRET not in made.stdout + made.stderr
        kept = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert any(path.name.startswith("worker") for path in kept)
        files = [*kept, *(path for path in (tmp_path / "run").rglob("*") if path.is_file())]
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("place", ["input.path", "output.path"])
def test_credentials_in_an_address_are_refused_and_not_repeated(tiny, tmp_path, place):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    file = tmp_path / "job.yaml"
    file.write_text(dump_config(job(prompts, tmp_path / "run", tiny())))
    refused = cage("relabel", "-c", str(file), f"{place}=s3://key:{SECRET}@bucket/folder")
    assert refused.returncode == 2
    assert "bucket's name" in refused.stderr
    assert SECRET not in refused.stdout + refused.stderr
    assert not (tmp_path / "run").exists()


def test_credentials_in_the_address_of_a_judge_are_refused_and_not_repeated(tiny, tmp_path):
    tree = {
        "input": {"path": "prompts.jsonl"},
        "output": {"path": str(tmp_path / "run")},
        "base": str(tiny()),
        "evaluation": {
            "judges": {
                "kind": {
                    "kind": "llm",
                    "rubric": "r",
                    "endpoint": {"url": f"https://me:{SECRET}@host/v1", "model": "m"},
                }
            },
        },
    }
    with pytest.raises(ConfigurationError) as caught:
        parse_as(EvaluateConfig, tree)
    assert "must not hold a user or a password" in str(caught.value)
    assert SECRET not in str(caught.value)
