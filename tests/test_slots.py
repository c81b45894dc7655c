"""`slots: auto`: as many rows at once as there is memory for."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch
from support.decoding import ask, config_of, decode, engine_of
from support.sampling_hosts import PAIR

from pipeline.errors import ConfigurationError
from pipeline.protocol.capacity import capacity_for
from pipeline.protocol.memory import MOST_SLOTS, SHARE, slots_that_fit
from pipeline.protocol.messages import MemoryBudget
from pipeline.worker import memory

# of a pass, float32: three states of 64 and three of 128 inside the feed-forward layer, one for a norm, two of 16
# that rotate heads; an id and a position
TOKEN_BYTES = 4 * (3 * 64 + 3 * 128) + 4 * 64 + 4 * 2 * 16 + 16
DECODING = {"max_new_tokens": 6, "agent_temperature": 0.5}
ROWS = [ask(f"r{at}", "tell me " * (at % 3) + "x" * (at + 1)) for at in range(9)]


@pytest.mark.parametrize(("slots_worth", "expected"), [(3.5, 3), (0.1, 1), (1e6, MOST_SLOTS["cpu"])])
def test_slots_are_what_memory_holds(tiny, monkeypatch, slots_worth, expected):
    config = config_of(tiny("llama"), PAIR, decoding=DECODING, cluster={"slots": "auto"})
    # two layers of two key-value heads of 16 float32, keys and values; 261 logits in 4 copies; three roles
    row_bytes = 3 * (1536 * (2 * 2 * 16 * 4 * 2) + 4 * 261 * 4 + TOKEN_BYTES)  # 1,024 + 6 tokens take 1,536
    free_bytes = int((slots_worth * row_bytes + 4096 * TOKEN_BYTES) / SHARE["cpu"])  # a pass over prompts beside them
    monkeypatch.setattr(memory, "free_bytes", lambda device: free_bytes)
    engine, _ = engine_of(config)
    assert engine.num_slots == expected


def test_hosts_share_the_memory_of_their_machine_and_answers_do_not_change(tiny, judge, monkeypatch):
    others = {
        "arm": {"kind": "arm", "model": str(tiny("gpt2")), "reference": "none", "weight": 0.1},
        "judge": {"kind": "reward_model", "model": str(judge()), "weight": 0.1},
    }
    monkeypatch.setattr(memory, "free_bytes", lambda device: 160_000_000)
    auto = config_of(tiny("llama"), {**PAIR, **others}, decoding=DECODING, cluster={"slots": "auto"})
    engine, _ = engine_of(auto)
    alone, _ = engine_of(config_of(tiny("llama"), PAIR, decoding=DECODING, cluster={"slots": "auto"}))
    budgets = [each for client in engine.calls.hosts.all for each in client.memory_budgets(1030).result()]
    left = 80_000_000 - sum(budget.reserved_bytes for budget in budgets)
    assert engine.num_slots == left // sum(budget.slot_bytes for budget in budgets)
    of_base = 80_000_000 - budgets[0].reserved_bytes
    assert 1 < engine.num_slots < alone.num_slots == of_base // budgets[0].slot_bytes
    # a reward model keeps no logits: two layers, two heads of 16, keys and values; it reads the newest token and ten
    # candidates, whose states are kept
    assert budgets[-1].slot_bytes == 1536 * (2 * 2 * 16 * 4 * 2) + 11 * (TOKEN_BYTES + 64 * 4)
    fixed = config_of(tiny("llama"), {**PAIR, **others}, decoding=DECODING, cluster={"slots": 2})
    assert decode(auto, ROWS) == decode(fixed, ROWS)


def test_the_device_with_the_least_memory_decides():
    gib = 2**30
    base, principal = MemoryBudget("gpu 0", "cuda", gib, 40 * gib), MemoryBudget("gpu 0", "cuda", gib // 2, 41 * gib)
    assert slots_that_fit([base]) == 34
    assert slots_that_fit([base, principal]) == 22
    assert slots_that_fit([base, principal, MemoryBudget("gpu 1", "cuda", gib, 12 * gib)]) == 10
    assert slots_that_fit([base, principal, MemoryBudget("here", "cpu", 0, gib)]) == 22
    assert slots_that_fit([MemoryBudget("gpu 0", "cuda", gib, gib // 2)]) == 1
    assert slots_that_fit([MemoryBudget("gpu 0", "cuda", gib, 40 * gib, reserved_bytes=4 * gib)]) == 30
    assert slots_that_fit([replace(base, reserved_bytes=4 * gib), replace(principal, reserved_bytes=3 * gib)]) == 18


def test_a_rows_buffers_are_at_most_half_as_long_again_as_the_row():
    assert [capacity_for(num) for num in (0, 1, 256, 257, 513, 769, 1025, 1537, 2049)] == [
        256, 256, 256, 512, 768, 1024, 1536, 2048, 3072
    ]  # fmt: skip
    assert all(num <= capacity_for(num) < 1.5 * num + 256 for num in range(1, 20_000))


def test_free_memory_is_what_the_machine_could_give_now():
    machine = psutil.virtual_memory()
    # other processes go on between the two readings
    assert memory.free_bytes(torch.device("cpu")) == pytest.approx(machine.available, abs=machine.total / 10)


@pytest.mark.parametrize("slots", [0, -1, "many", 5000])
def test_slots_are_a_number_or_auto(slots):
    with pytest.raises(ConfigurationError, match=r"cluster\.slots must be .*; got"):
        config_of("m", cluster={"slots": slots})
