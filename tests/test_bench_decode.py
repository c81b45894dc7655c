"""The benchmark of the decoder measures what it says, on a model small enough for a test."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce

from jobs.bench import decode
from jobs.bench.decode import run_bench_decode
from jobs.bench.ranks import CountingRanks
from pipeline.errors import ConfigurationError
from pipeline.protocol.hosts import Hosts, Reply
from pipeline.protocol.messages import DRAWN, Admission, Position, Step
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts

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


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(decode, "FULL_BATCH_STEPS", 4)
    monkeypatch.setattr(decode, "FULL_BATCH_ROUNDS", 1)


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


class Sends:
    """Samples with three collectives."""

    def advance_and_sample(self, at, step, slots, terms, uniforms):
        dist.all_reduce(torch.ones(4))
        dist.all_gather([torch.empty(6)], torch.ones(6))
        all_reduce(torch.ones(3), "sum", dist.group.WORLD).sum()
        return Reply(list)


def test_what_a_rank_gives_to_collectives_is_counted_in_steps_that_append_tokens():
    host = CountingRanks()(Sends())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for step in (Step([Admission(0, {"base": [1]})]), Step((), [0], [DRAWN]), Step((), [0], [DRAWN])):
            assert host.advance_and_sample(Position(0, 0, 0), step, [0], [], [0.5]).result() == []
    finally:
        dist.destroy_process_group()
    assert host.collectives() == (2, 2 * 3, 2 * 4 * (4 + 6 + 3))


def test_what_ranks_sent_is_written_beside_their_case(tmp_path, monkeypatch, capsys):
    """Ranks themselves are processes, which are started nightly."""

    def measured_ranks(setup):
        assembly = setup.assembly()
        engine = make_engine(assembly, Hosts.lone(start_hosts(assembly).base, runs_ahead=False))
        return decode._decode(engine, setup.work, threads=1), {"per_step": 10.0, "bytes_per_step": 2048.0}

    monkeypatch.setattr(decode, "measure_ranks", measured_ranks)
    options = {**OPTIONS, "num_adapters": 0, "candidates": "20", "json_file": tmp_path / "measured.json"}
    run_bench_decode(**options, num_ranks=2)
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["cases"]["2 ranks"]["tokens"] == measured["cases"]["local"]["tokens"]
    assert measured["collectives"] == {"per_step": 10.0, "bytes_per_step": 2048.0}
    assert "ranks: 10 collectives a step, to which each gives 2.0 KiB" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match=r"--tensor-parallel must be 1 .*got 3: its num_attention_heads, 4"):
        run_bench_decode(**options, num_ranks=3)


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
