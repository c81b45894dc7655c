"""Passes and games replayed from a captured graph, with other tokens, rows, lengths and adapters than it saw."""

from __future__ import annotations

import pytest
import torch
from support.language_models import (
    ADAPTER_ROLES,
    ADAPTER_SKIPS,
    CHANGING_BATCHES,
    CHANGING_PROMPTS,
    logits_after,
    runner_of,
)
from support.lora import make_lora
from support.sampling_hosts import FOUR, LoneHost, assert_same, config_of_lone_host, watch_pools
from support.tape import TapeGraph

from pipeline.worker import cuda_graphs

CPU = torch.device("cpu")


@pytest.fixture
def pools(monkeypatch):
    """Every pool that is made captures on tape, as if it were on a GPU; the pools."""
    monkeypatch.setattr(cuda_graphs, "CapturedGraph", TapeGraph)
    return watch_pools(monkeypatch, device=torch.device("cuda"))


def captured_names(pools):
    return {name for pool in pools for name in pool.captured}


def test_a_tape_replays_what_was_done_and_refuses_what_a_capture_would():
    source, kept = torch.arange(4.0), []
    graph = TapeGraph(lambda: kept.append(0) or (source * 2).add_(1)[1:], CPU)
    source += 10
    assert graph.replay().tolist() == [23.0, 25.0, 27.0]
    assert len(kept) == 3
    for forbidden in (lambda: source.sum().item(), lambda: torch.tensor([1, 2]), lambda: source[source > 2]):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            TapeGraph(forbidden, CPU)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_captured_passes_give_the_logits_of_passes_that_are_not(tiny, kind, pools):
    """Rows come and go, and one outgrows its buffer."""
    plain, captured = (
        runner_of(tiny(kind), strict=False, num_slots=5, has_fixed_shapes=fixed) for fixed in (False, True)
    )
    for places in CHANGING_BATCHES:
        expected, found = (
            logits_after(runner, places, CHANGING_PROMPTS, num_steps=9) for runner in (plain, captured)
        )
        for row in places:
            torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=0)
    assert captured_names(pools[-1:]) == {"rows"}


def test_captured_passes_give_every_token_its_own_adapter(tiny, tmp_path, pools):
    adapters = {
        "one": make_lora(tmp_path / "one", tiny("llama"), "q_proj", "up_proj", seed=1),
        "two": make_lora(tmp_path / "two", tiny("llama"), "v_proj", seed=2, r=6),
    }
    plain, captured = (
        runner_of(tiny("llama"), roles=ADAPTER_ROLES, adapters=adapters, has_fixed_shapes=fixed)
        for fixed in (False, True)
    )
    for places in CHANGING_BATCHES:
        expected, found = (
            logits_after(runner, places, CHANGING_PROMPTS, num_steps=5, skips=ADAPTER_SKIPS)
            for runner in (plain, captured)
        )
        for row in places:
            torch.testing.assert_close(found[row], expected[row], atol=1e-4, rtol=0)
    assert captured_names(pools[-1:]) == {"rows"}


@pytest.mark.parametrize("decoding", [{}, {"min_p": 0.05, "top_p": 0.9}, {"candidates": "all"}])
@pytest.mark.parametrize("num_principals", [1, 2, 3])
def test_captured_games_are_drawn_as_games_that_are_not(tiny, num_principals, decoding, pools):
    principals = dict(list(FOUR.items())[:num_principals])
    config = config_of_lone_host(tiny(), principals, max_new_tokens=9, **decoding)
    found = LoneHost.start(config, captures=True).decode()
    assert {"games"} < captured_names(pools)  # and at least one number of steps
    assert_same(LoneHost.start(config, captures=False).decode(), found)
