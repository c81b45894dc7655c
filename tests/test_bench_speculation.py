"""`cage bench speculation`: the same records with drafts and without, and what drafts saved."""

from __future__ import annotations

import json

import pytest
from support.runs import write_prompts
from support.unreliable import FreePace
from typer.testing import CliRunner

from jobs.bench import speculation
from jobs.bench.cli import bench
from jobs.bench.speculation import run_bench_speculation
from pipeline.engine import drafting
from pipeline.engine.model_drafts import ModelDrafts
from pipeline.errors import ConfigurationError


def test_every_kind_of_workload_is_measured_and_written(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drafting, "Pace", FreePace)
    monkeypatch.setattr(ModelDrafts, "_how_many", lambda self, ranked, *_: len(ranked))
    kinds = [
        "relabel: base's own, tau 1",
        "relabel: shorter",
        "grid: 5 weights x 2 rules, s",
        "synthesis",
        "weak-to-strong",
    ]
    run_bench_speculation(
        model=str(tiny()), prompts=write_prompts(tmp_path / "in.jsonl", 2), num_rows=2, max_new_tokens=5, slots=[3],
        repeats=2, workloads=kinds, json_file=tmp_path / "out.json", draft_model={"layers": 1},
    )  # fmt: skip
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["tokens"] for case in cases] == [10, 10, 100, 40, 10, 10]
    for case in cases:
        assert case["passes"] + case["accepted"] == case["tokens"]
        assert sum(case["accepted_by_source"].values()) == case["accepted"] <= case["drafted"]
        assert min(case["speedups"]) <= case["speedup"] <= max(case["speedups"])
        assert len(case["speedups"]) == 2
    assert cases[2]["accepted"] > 10
    assert all(case["drafted"] and {*case["accepted_by_source"]} == {"model"} for case in cases[4:])
    assert "passes a token" in capsys.readouterr().out


def test_a_shape_has_random_weights_and_prompts_and_a_quarter_of_its_layers_propose(tmp_path):
    out = tmp_path / "out.json"
    options = ["--shape", "1M", "--rows", "2", "--max-new-tokens", "4", "--slots", "2"]
    workloads = ["--workload", "relabel: base's own, tau 1", "--workload", "weak-to-strong: greedy"]
    done = CliRunner().invoke(
        bench, ["speculation", *options, *workloads, "--json", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0
    found = json.loads(out.read_text())
    assert (found["model"], found["draft_model"]["layers"]) == ("random 1M", 1)  # of four
    assert [case["tokens"] for case in found["cases"]] == [8, 8]


def test_five_sixths_of_the_bases_layers_propose_where_no_number_is_given(tiny, tmp_path):
    prompts, out = write_prompts(tmp_path / "in.jsonl", 1), tmp_path / "out.json"
    options = ["--rows", "1", "--max-new-tokens", "2", "--slots", "1", "--workload", "weak-to-strong: greedy"]
    paths = ["--model", str(tiny()), "--prompts", str(prompts), "--json", str(out)]
    done = CliRunner().invoke(bench, ["speculation", *paths, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(out.read_text())["draft_model"] == {"model": None, "layers": 1}  # of two


def test_a_workload_that_cannot_run_is_refused_before_any_is_measured(tiny, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(speculation._Bench, "measure", lambda self, workload, *_: measured.append(workload))
    with pytest.raises(ConfigurationError, match=r"has 2 layers; draft_model\.layers must be below that, got 25"):
        run_bench_speculation(
            model=str(tiny()), prompts=write_prompts(tmp_path / "in.jsonl", 1), num_rows=1, max_new_tokens=2,
            slots=[1], repeats=1, workloads=["grid", "weak-to-strong"], json_file=None, draft_model={"layers": 25},
        )  # fmt: skip
    assert not measured


def test_a_workload_that_is_unknown_is_refused(tmp_path):
    options = {"model": "x", "num_rows": 1, "max_new_tokens": 1, "slots": [1], "repeats": 1, "draft_model": {}}
    options["json_file"] = None
    with pytest.raises(ConfigurationError, match="of one of: relabel"):
        run_bench_speculation(prompts=tmp_path, workloads=["chat"], **options)
    with pytest.raises(ConfigurationError, match="--shape must be one of 1M, "):
        run_bench_speculation(prompts=tmp_path, workloads=[], shape="2B", **options)
    with pytest.raises(ConfigurationError, match="there is no file"):
        run_bench_speculation(prompts=tmp_path / "none", workloads=[], **options)
