"""Passes and games done again from a recording, with other tokens, rows, lengths and adapters than it saw."""

from __future__ import annotations

import pytest
import test_adapters
import torch
from support.lora import make_lora
from support.tape import TapeRecording
from test_recorded_games import FOUR, assert_same, records
from test_strict import host_of, logits_after

from pipeline.worker import cuda_graphs
from pipeline.worker.cuda_graphs import GraphPool

CPU = torch.device("cpu")
PROMPTS = [[3, 9, 4], list(range(250)), [7] * 30, [5, 6], [8] * 12]
PLACES = ({0: 2, 1: 0, 2: 3}, {1: 1}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4})


@pytest.fixture
def recorders(monkeypatch):
    """Every recorder that is made records on tape; the recorders."""
    made = []
    begin = GraphPool.__init__

    def recording(self, device, what):
        begin(self, device, what)
        self._records = True
        made.append(self)

    monkeypatch.setattr(GraphPool, "__init__", recording)
    monkeypatch.setattr(cuda_graphs, "CapturedGraph", TapeRecording)
    return made


def names_of(recorders):
    return {name for recorder in recorders for name in recorder.recorded}


def test_a_tape_does_again_what_was_done_and_refuses_what_a_capture_would():
    source, kept = torch.arange(4.0), []
    recording = TapeRecording(lambda: kept.append(0) or (source * 2).add_(1)[1:], CPU)
    source += 10
    assert recording.replay().tolist() == [23.0, 25.0, 27.0]
    assert len(kept) == 3
    for forbidden in (lambda: source.sum().item(), lambda: torch.tensor([1, 2]), lambda: source[source > 2]):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            TapeRecording(forbidden, CPU)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_recorded_passes_give_the_logits_of_passes_that_are_not(tiny, kind, recorders):
    """Rows come and go, and one outgrows its buffer."""
    plain = host_of(tiny(kind), strict=False, num_slots=5, has_static_steps=False)
    recorded = host_of(tiny(kind), strict=False, num_slots=5, has_static_steps=True)
    for places in PLACES:
        expected, found = (logits_after(host, places, PROMPTS, num_steps=9) for host in (plain, recorded))
        for row in places:
            torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=0)
    assert names_of(recorders) == {"rows"}


def test_recorded_passes_give_every_token_its_own_adapter(tiny, tmp_path, recorders):
    adapters = {
        "one": make_lora(tmp_path / "one", tiny("llama"), "q_proj", "up_proj", seed=1),
        "two": make_lora(tmp_path / "two", tiny("llama"), "v_proj", seed=2, r=6),
    }
    plain, recorded = (test_adapters.host_of(tiny("llama"), adapters, is_static=static) for static in (False, True))
    for places in PLACES:
        expected, found = (
            test_adapters.logprobs_after(host, PROMPTS, places, num_steps=5) for host in (plain, recorded)
        )
        for row in places:
            torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=0)
    assert names_of(recorders) == {"rows"}


@pytest.mark.parametrize("decoding", [{}, {"min_p": 0.05, "top_p": 0.9}, {"candidates": "all"}])
@pytest.mark.parametrize("num_principals", [1, 2, 3])
def test_recorded_games_are_drawn_as_games_that_are_not(tiny, num_principals, decoding, recorders):
    principals = dict(list(FOUR.items())[:num_principals])
    found, _ = records(tiny, records_games=True, principals=principals, **decoding)
    assert {"games"} < names_of(recorders)  # and at least one number of steps
    expected, _ = records(tiny, records_games=False, principals=principals, **decoding)
    assert_same(expected, found)
