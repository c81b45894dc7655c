"""The benchmark of the decoder measures what it says, on a model small enough for a test."""

from __future__ import annotations

import json

import pytest

from jobs.bench.decode import run_bench_decode
from pipeline.errors import ConfigurationError

OPTIONS = {
    "model": None,
    "shape": "1M",
    "num_principals": 1,
    "num_adapters": 1,
    "slots": 2,
    "num_rows": 5,
    "mean_length": 4,
    "max_length": 8,
    "threads": 1,
    "with_ray": False,
}


@pytest.mark.parametrize("candidates", ["20", "all"])
def test_every_case_is_measured_and_written(tmp_path, candidates, capsys):
    run_bench_decode(**OPTIONS, candidates=candidates, json_file=tmp_path / "measured.json")
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert {"floor", "local", "plain", "batch1"} <= measured["cases"].keys()
    for case in measured["cases"].values():
        assert case["tokens_per_s"] > 0
        assert 0 < case["slot_utilisation"] <= 1
        assert sum(case["share"][part] for part in ("forward", "solve", "transport", "wait")) == pytest.approx(1)
    assert measured["cases"]["local"]["tokens"] == measured["cases"]["plain"]["tokens"]
    assert measured["cases"]["local"]["forwards_per_step"] == 1
    assert (measured["principals"], measured["adapters"]) == (2, 1)
    assert measured["full_batch"]["to_one_row"] > 0
    assert measured["full_batch"]["row_by_row"] > 0.5
    assert "of the floor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"), [("shape", "2M"), ("candidates", "0"), ("candidates", "most"), ("rows", 1)]
)
def test_what_cannot_be_measured_is_refused_by_name(option, value):
    name = "num_rows" if option == "rows" else option
    options = {**OPTIONS, "candidates": "50", "json_file": None, name: value}
    with pytest.raises(ConfigurationError, match=f"--{option} must be .*{value}"):
        run_bench_decode(**options)


@pytest.mark.nightly
def test_ranks_are_measured_beside_one_process_and_what_they_send_is_counted(tmp_path, capsys):
    options = {**OPTIONS, "num_adapters": 0, "candidates": "20", "json_file": tmp_path / "measured.json"}
    run_bench_decode(**options, num_ranks=2)
    measured = json.loads((tmp_path / "measured.json").read_text())
    one, two = measured["cases"]["local"], measured["cases"]["2 ranks"]
    assert (two["tokens"], two["forwards_per_step"]) == (one["tokens"], 1)
    sent = measured["collectives"]
    # the embedding, the ends of attention and MLP in four layers, and the logits
    assert sent["per_step"] == 1 + 2 * 4 + 1
    rows, width, half_of_vocabulary = 2 * 2, 128, 1024
    assert sent["bytes_per_step"] == rows * 4 * ((1 + 2 * 4) * width + half_of_vocabulary)
    assert "ranks: 10 collectives a step" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match=r"--tensor-parallel must be 1 .*got 3: its num_attention_heads, 4"):
        run_bench_decode(**options, num_ranks=3)
