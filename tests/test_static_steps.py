"""Passes of fixed shapes, as a GPU takes them, on a CPU: prompts in passes of their own, whatever they share."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of
from test_recorded_games import assert_same
from test_strict import ROLES, host_of, logits_after

from pipeline.attention import rows as row_attention
from pipeline.attention.segments import Copied, Segment
from pipeline.engine.engine import Engine, decode_rows
from pipeline.protocol.clients import LocalHost
from pipeline.runtime.assembly import assemble
from pipeline.worker import cuda_graphs
from pipeline.worker.compiled_layers import CompiledLayers
from pipeline.worker.cuda_graphs import GraphPool
from pipeline.worker.forward_batch import Draft
from pipeline.worker.language_model_runner import Host
from pipeline.worker.loading import load_host
from pipeline.worker.sampling_host import SamplingHost

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind to everybody who asks", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
CPU = torch.device("cpu")


def decoded(tiny, kind, rows, *, is_static, num_samples=3):
    """Records by row and sample, and the host."""
    decoding = {"max_new_tokens": 12, "trace": "tokens", "agent_temperature": 0.3, "temperature": 1.2}
    config = config_of(tiny(kind), PAIR, decoding=decoding, cluster={"slots": 4})
    assembly = assemble(config, NOWHERE)
    (plan,) = assembly.topology.hosts
    host = load_host(assembly.hosts[0])
    if is_static:
        host = Host(host._passes._model, plan.roles, num_slots=4, vocab_size=261, strict=True, has_static_steps=True)
    playing = SamplingHost(host, plan.roles, config.decoding, assembly.topology.principals, records_games=is_static)
    engine = Engine(
        assembly.topology, {"base": LocalHost(playing, plan)}, assembly.prompter, config.decoding, assembly.variants,
        num_slots=4, runs_ahead=is_static,
    )  # fmt: skip
    records = {f"{each.row_id}/{each.sample}": each for each in decode_rows(engine, rows, num_samples=num_samples)}
    return records, host


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_samples_and_principles_that_share_prompts_are_answered_as_in_packed_passes(tiny, kind, monkeypatch):
    monkeypatch.setattr("pipeline.worker.forward_passes.PROMPT_SHAPE", 64)
    monkeypatch.setattr("pipeline.worker.forward_passes.MOST_SEGMENTS", 3)
    monkeypatch.setattr("pipeline.worker.captured_passes.MOST_SEGMENTS", 3)
    rows = [ask(f"r{at}", "tell me " * (at % 3 * 4) + "x" * (at + 1)) for at in range(5)]
    rows.append(ask("again", rows[1].messages[0]["content"]))
    expected, packed = decoded(tiny, kind, rows, is_static=False)
    found, static = decoded(tiny, kind, rows, is_static=True)
    assert_same(expected, found, tolerance=1e-3)
    assert packed.num_forwards < static.num_forwards  # prompts take passes of their own
    assert static._passes.num_tokens < 1.2 * packed._passes.num_tokens  # and are computed once


def draft_of(*prompts: tuple[int, int, int]) -> Draft:
    draft = Draft()
    for row, start, stop in prompts:
        draft.segments.append(Segment(row, start, stop))
        draft.tokens += [100 * row + at for at in range(start, stop)]
    return draft


def test_prompts_are_cut_where_they_alone_say_and_packed_in_order():
    draft = draft_of((0, 0, 5), (1, 0, 23), (2, 7, 9))
    passes = list(draft.prompt_passes(10, 8))
    assert [part.segments for part in passes] == [
        [Segment(0, 0, 5)],
        [Segment(1, 0, 10)],
        [Segment(1, 10, 20)],
        [Segment(1, 20, 23), Segment(2, 7, 9)],
    ]
    assert passes[3].tokens == [120, 121, 122, 207, 208]
    assert [token for part in passes for token in part.tokens] == draft.tokens
    assert [len(part.segments) for part in draft_of(*((row, 0, 1) for row in range(5))).prompt_passes(10, 2)] == [
        2,
        2,
        1,
    ]


def test_what_a_row_copies_is_computed_before_and_copied_before_it_is_read():
    draft = draft_of((0, 0, 6), (1, 4, 6))
    draft.follows += [Copied(0, 1, 0, 4), Copied(0, 2, 0, 6)]
    first, second, last = draft.prompt_passes(20, 8)
    assert (first.copies, first.segments) == ([], [Segment(0, 0, 6)])
    assert (second.copies, second.segments) == ([Copied(0, 1, 0, 4)], [Segment(1, 4, 6)])
    assert (last.copies, last.segments) == ([Copied(0, 2, 0, 6)], [])


def test_what_cannot_be_recorded_is_told_once_and_computed(monkeypatch):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", refuse)
    recorder = GraphPool(CPU, "passes")
    recorder._records = True  # as on a GPU
    with pytest.warns(RuntimeWarning, match="passes are not recorded as CUDA graphs: operation not permitted"):
        assert recorder.run("one", lambda: 1) == 1
    assert recorder.run("two", lambda: 2) == 2
    assert not recorder.recorded


def test_a_recording_without_memory_is_no_reason_to_go_on_without(monkeypatch):
    def refuse(function, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", refuse)
    recorder = GraphPool(CPU, "passes")
    recorder._records = True
    with pytest.raises(torch.OutOfMemoryError):
        recorder.run("one", lambda: 1)


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
    model = host_of(tiny("llama", seed=4), strict=True, num_slots=3)._passes._model
    prompts = [[3, 9, 4], list(range(250)), [7] * 30]
    hosts = [Host(model, ROLES, num_slots=3, vocab_size=261, strict=True, has_static_steps=True) for _ in range(2)]
    expected = logits_after(hosts[0], {0: 0, 1: 1, 2: 2}, prompts)
    hosts[1]._passes._compiled = CompiledLayers(model)
    torch._dynamo.utils.counters.clear()
    found = logits_after(hosts[1], {0: 0, 1: 1, 2: 2}, prompts)
    for row in expected:
        torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of two layers and two shapes
    torch._dynamo.reset()
