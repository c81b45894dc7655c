"""Passes of fixed shapes, as a GPU takes them, on a CPU: prompts in passes of their own, whatever they share."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from support.decoding import ask
from support.language_models import compile_layers, logits_after, runner_of
from support.sampling_hosts import LoneHost, assert_same, config_of_lone_host

from pipeline.attention import rows as row_attention
from pipeline.attention.segments import Copied, Segment
from pipeline.worker import cuda_graphs
from pipeline.worker.cuda_graphs import GraphPool
from pipeline.worker.forward_batch import ForwardBatch

PRINCIPALS = {
    "kind": {"kind": "prompted", "principle": "be kind to everybody who asks", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
GPU = torch.device("cuda")  # named only: nothing runs there


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_samples_and_principles_that_share_prompts_are_answered_as_in_packed_passes(tiny, kind, monkeypatch):
    monkeypatch.setattr("pipeline.worker.forward_passes.PROMPT_SHAPE", 64)
    monkeypatch.setattr("pipeline.worker.forward_passes.MOST_SEGMENTS", 3)
    monkeypatch.setattr("pipeline.worker.captured_passes.MOST_SEGMENTS", 3)
    rows = [ask(f"r{at}", "tell me " * (at % 3 * 4) + "x" * (at + 1)) for at in range(5)]
    rows.append(ask("again", rows[1].messages[0]["content"]))
    config = config_of_lone_host(tiny(kind), PRINCIPALS, max_new_tokens=12, agent_temperature=0.3)
    packed = LoneHost.start(config, captures=False, has_fixed_shapes=False)
    fixed = LoneHost.start(config, captures=True, has_fixed_shapes=True)
    expected = packed.decode(rows, runs_ahead=False, num_samples=3)
    found = fixed.decode(rows, runs_ahead=True, num_samples=3)
    assert_same(expected, found, tolerance=1e-3)
    packed_work, fixed_work = packed.host.work(), fixed.host.work()
    assert packed_work.num_forwards < fixed_work.num_forwards  # prompts take passes of their own
    assert fixed_work.num_tokens < 1.2 * packed_work.num_tokens  # and are computed once


def batch_of(*prompts: tuple[int, int, int]) -> ForwardBatch:
    batch = ForwardBatch()
    for row, start, stop in prompts:
        batch.segments.append(Segment(row, start, stop))
        batch.tokens += [100 * row + at for at in range(start, stop)]
    return batch


def test_prompts_are_cut_where_they_alone_say_and_packed_in_order():
    batch = batch_of((0, 0, 5), (1, 0, 23), (2, 7, 9))
    passes = list(batch.prompt_passes(10, 8))
    assert [part.segments for part in passes] == [
        [Segment(0, 0, 5)],
        [Segment(1, 0, 10)],
        [Segment(1, 10, 20)],
        [Segment(1, 20, 23), Segment(2, 7, 9)],
    ]
    assert passes[3].tokens == [120, 121, 122, 207, 208]
    assert [token for part in passes for token in part.tokens] == batch.tokens
    assert [len(part.segments) for part in batch_of(*((row, 0, 1) for row in range(5))).prompt_passes(10, 2)] == [
        2,
        2,
        1,
    ]


def test_what_a_row_copies_is_computed_before_and_copied_before_it_is_read():
    batch = batch_of((0, 0, 6), (1, 4, 6))
    batch.prefix_copies += [Copied(0, 1, 0, 4), Copied(0, 2, 0, 6)]
    first, second, last = batch.prompt_passes(20, 8)
    assert (first.copies, first.segments) == ([], [Segment(0, 0, 6)])
    assert (second.copies, second.segments) == ([Copied(0, 1, 0, 4)], [Segment(1, 4, 6)])
    assert (last.copies, last.segments) == ([Copied(0, 2, 0, 6)], [])


def test_what_cannot_be_captured_is_reported_once_and_computed(monkeypatch):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", refuse)
    pool = GraphPool(GPU, "passes")
    with pytest.warns(RuntimeWarning, match="passes are not captured as CUDA graphs.*: operation not permitted"):
        assert pool.run("one", lambda: 1) == 1
    assert pool.run("two", lambda: 2) == 2
    assert not pool.captured


def test_a_capture_without_memory_is_no_reason_to_go_on_without(monkeypatch):
    def refuse(function, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        GraphPool(GPU, "passes").run("one", lambda: 1)


@pytest.mark.parametrize(
    ("has_triton", "has_compiler", "capability", "missing"),
    [
        (True, True, (9, 0), None),
        (False, True, (8, 0), "the package triton"),
        (True, False, (9, 0), "a C compiler (gcc, say)"),
        (True, True, (7, 5), "a GPU of compute capability 8.0 or later"),
    ],
)
def test_what_kernels_need_is_named(monkeypatch, has_triton, has_compiler, capability, missing):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if has_triton else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if has_compiler else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert row_attention.what_is_missing.__wrapped__(torch.device("cuda")) == missing
    assert not row_attention.serves(torch.zeros(2, 64), torch.zeros(2, 64))


def test_layers_are_compiled_once_for_a_shape_and_compute_the_same(tiny, monkeypatch):
    """As on a GPU, but for the backend: one compilation serves all layers, joined projections included."""
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    prompts, places = [[3, 9, 4], list(range(250)), [7] * 30], {0: 0, 1: 1, 2: 2}
    plain, fast = (
        runner_of(tiny("llama", seed=4), strict=True, num_slots=3, has_fixed_shapes=True) for _ in range(2)
    )
    expected = logits_after(plain, places, prompts)
    compile_layers(fast)
    torch._dynamo.utils.counters.clear()
    found = logits_after(fast, places, prompts)
    assert found.keys() == expected.keys()
    for row in expected:
        torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of two layers and two shapes
    torch._dynamo.reset()
