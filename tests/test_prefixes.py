"""Prompts are computed once: answers to one prompt share it, prompts with one system message share that; long ones
take several steps. None of it changes a bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.decoding import ask, config_of, decode, engine_of

from pipeline.attention.prefixes import Prefixes, Prompt
from pipeline.engine import scheduler
from pipeline.engine.engine import decode_rows
from pipeline.protocol import messages
from pipeline.worker import language_model_runner as hosts
from pipeline.worker import reward_model_runner

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind to everyone you meet", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
ROWS = [ask(f"r{at}", "tell me " * (at % 3) + "x" * (at + 1)) for at in range(6)]
DECODING = {"max_new_tokens": 5, "trace": "tokens", "n": 4}


def computed(config, rows, **counts):
    """The records by row and sample, and the tokens that went through the base's host."""
    engine, _ = engine_of(config)
    records = {(r.row_id, r.sample): r for r in decode_rows(engine, rows, **counts)}
    return records, engine.calls.hosts["base"].host.work().num_tokens, engine


def share_nothing(monkeypatch):
    monkeypatch.setattr(Prefixes, "find", lambda self, prompt, *, preferred: (preferred, 0))
    monkeypatch.setattr("pipeline.worker.forward_batch.Draft.begin", lambda self, row, prompt: (row, 0))


def test_samples_of_one_prompt_compute_it_once(tiny):
    sections = {"cluster": {"slots": 8}}
    row = ask("one", "tell me a long story about the sea " * 4)
    one, tokens_of_one, engine = computed(config_of(tiny(), PAIR, decoding=DECODING, **sections), [row])
    many, tokens_of_many, _ = computed(config_of(tiny(), PAIR, decoding=DECODING, **sections), [row], num_samples=4)
    assert many["one", 0] == one["one", 0]
    assert len({record.response for record in many.values()}) == 4
    num_roles = len(engine._lineup.roles)
    steps = sum(record.num_tokens for record in many.values()) - one["one", 0].num_tokens
    assert tokens_of_many - tokens_of_one <= num_roles * steps  # no prompt token but the last of each


def test_prompts_share_what_their_system_message_gives(tiny, monkeypatch):
    config = config_of(tiny(), PAIR, decoding={**DECODING, "n": 1}, cluster={"slots": 2})
    shared, tokens_shared, engine = computed(config, ROWS)
    share_nothing(monkeypatch)
    plain, tokens_plain, _ = computed(config, ROWS)
    assert shared == plain
    encoded = engine._prompter.encode(ROWS[0].messages)
    heads = engine._prompter.heads(ROWS[0].messages, encoded)
    assert heads["kind"] > len(PAIR["kind"]["principle"])
    assert heads["kind"] < len(encoded["kind"])
    assert tokens_plain - tokens_shared == (len(ROWS) - 1) * sum(heads.values())


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
def test_sharing_and_long_prompts_in_parts_change_no_answer(tiny, monkeypatch, slots, reproducibility):
    monkeypatch.setattr(messages, "CHUNK", 16)
    monkeypatch.setattr(hosts, "CHUNK", 16)
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS_A_STEP", 40)
    rows = [ask(f"r{at}", "long " * (4 * at % 17) + "x" * at) for at in range(7)]
    decoding = {**DECODING, "n": 2, "reproducibility": reproducibility, "temperature": 0.0}
    records = decode(config_of(tiny("mistral"), PAIR, decoding=decoding, cluster={"slots": slots}), rows)
    share_nothing(monkeypatch)
    alone = decode(config_of(tiny("mistral"), PAIR, decoding=decoding, cluster={"slots": 1}), rows)
    if reproducibility == "strict":
        assert records == alone
    assert {key: record.response for key, record in records.items()} == {
        key: record.response for key, record in alone.items()
    }


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_reward_model_reads_a_prompt_once_for_all_answers_and_roles(tiny, judge, monkeypatch, slots):
    folder = str(judge("llama", num_labels=2))
    judges = {
        "one": {"kind": "reward_model", "model": folder, "label": 0},
        "two": {"kind": "reward_model", "model": folder, "label": 1},
    }
    rows = [ask(f"r{at}", "long " * (3 * at % 7) + "x" * (at + 1)) for at in range(4)]
    config = config_of(tiny(), judges, decoding={**DECODING, "n": 3}, cluster={"slots": slots})

    shared, _, engine = computed(config, rows, num_samples=3)
    share_nothing(monkeypatch)
    plain, _, other = computed(config, rows, num_samples=3)
    assert shared == plain
    host, lone = (each.calls.hosts["one"].host._host for each in (engine, other))
    for each in (host, lone):
        assert len(each._prefixes._held) <= 2 * slots  # what rows held that are gone is let go
    spared = 0  # of a prompt: all but the last token for 3 samples and 2 roles; of a head: for all but the first row
    for at, row in enumerate(rows):
        encoded = engine._prompter.encode(row.messages)
        head, length = engine._prompter.heads(row.messages, encoded)["one"], len(encoded["one"])
        assert 0 < head < length - 1
        spared += 5 * (length - 1) + (head if at else 0)
    assert lone.num_tokens - host.num_tokens == spared


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize(
    ("kind", "reproducibility"), [("mistral", "strict"), ("mistral", "relaxed"), ("llama", "strict")]
)
def test_a_reward_model_reads_long_prompts_in_parts_to_the_same_answers(
    tiny, judge, monkeypatch, kind, slots, reproducibility
):
    for module in (messages, hosts, reward_model_runner):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS_A_STEP", 40)
    longest = []
    read = reward_model_runner.RewardModelRunner._read
    monkeypatch.setattr(
        reward_model_runner.RewardModelRunner,
        "_read",
        lambda self, readings: longest.append(max(len(each.trunk) for each in readings)) or read(self, readings),
    )
    judges = {"judge": {"kind": "reward_model", "model": str(judge(kind)), "candidates": 4}}
    systems = [None, "be brief " * 5, "be brief " * 5, "be kind"]  # what they begin with takes several parts, too
    rows = [
        replace(row, messages=({"role": "system", "content": system}, *row.messages)) if system else row
        for row, system in zip(
            [ask(f"r{at}", "long " * (4 * at % 17) + "x" * at) for at in range(8)], systems * 2, strict=True
        )
    ]
    decoding = {**DECODING, "n": 2, "reproducibility": reproducibility, "temperature": 0.0}
    records = decode(config_of(tiny(), judges, decoding=decoding, cluster={"slots": slots}), rows)
    assert max(longest) == 16
    share_nothing(monkeypatch)
    alone = decode(config_of(tiny(), judges, decoding=decoding, cluster={"slots": 1}), rows)
    if reproducibility == "strict":
        assert records == alone
    assert {key: record.response for key, record in records.items()} == {
        key: record.response for key, record in alone.items()
    }


def test_a_prompt_is_found_as_long_as_a_row_holds_it():
    held = Prefixes()
    first, other = Prompt.of(None, [1, 2, 3, 4, 5], 2), Prompt.of(None, [1, 2, 9, 9], 2)
    assert held.find(first, preferred=7) == (7, 0)
    held.put(0, first)
    held.put(1, first)
    assert held.find(first, preferred=0) == (0, 4)
    assert held.find(first, preferred=9) == (1, 4)
    assert held.find(other, preferred=9) == (1, 2)
    assert held.find(Prompt.of("adapter", [1, 2, 3, 4, 5], 2), preferred=9) == (9, 0)
    held.put(1, other)
    held.drop(0)
    assert held.find(first, preferred=9) == (1, 2)
    held.clear()
    assert held.find(first, preferred=9) == (9, 0)
