"""Prompts are computed once: answers to one prompt share it, prompts with one system message share that; long ones
take several steps. None of it changes a bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.decoding import NOWHERE, ask, config_of, engine_of
from support.reward_hosts import RewardReplica, num_row_caches

from pipeline.attention.branches import reading
from pipeline.attention.prefixes import Prefixes, Prompt
from pipeline.engine import scheduler
from pipeline.engine.engine import decode_rows
from pipeline.protocol import messages
from pipeline.runtime.assembly import assemble
from pipeline.worker import branch_runner, language_model_runner
from pipeline.worker.forward_batch import ForwardBatch

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind to everyone you meet", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
ROWS = [ask(f"r{at}", "tell me " * (at % 3) + "x" * (at + 1)) for at in range(6)]
DECODING = {"max_new_tokens": 5, "trace": "tokens", "n": 4}


def computed(config, rows, **counts):
    """The records by row and sample, and the tokens that went through the lone host's model."""
    engine, _ = engine_of(config)
    records = {(each.row_id, each.sample): each for each in decode_rows(engine, rows, **counts)}
    return records, engine.calls.hosts.sampler.work().result().num_tokens


def share_nothing(monkeypatch):
    monkeypatch.setattr(Prefixes, "find", lambda self, prompt, *, preferred: (preferred, 0))
    monkeypatch.setattr(ForwardBatch, "begin", lambda self, row, prompt: (row, 0))


def read_in_parts(monkeypatch):
    """From now on a few words are a long prompt. Models are loaded before, as their probes are read in one part."""
    for module in (messages, language_model_runner, branch_runner):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS_PER_STEP", 40)


def answers(engine, rows):
    """Two records of each row."""
    return {(each.row_id, each.sample): each for each in decode_rows(engine, rows, num_samples=2)}


def test_samples_of_one_prompt_compute_it_once(tiny):
    config = config_of(tiny(), PAIR, decoding=DECODING, cluster={"slots": 8})
    row = ask("one", "tell me a long story about the sea " * 4)
    one, tokens_of_one = computed(config, [row])
    many, tokens_of_many = computed(config, [row], num_samples=4)
    assert many["one", 0] == one["one", 0]
    assert len({record.response for record in many.values()}) == 4
    num_roles = len(assemble(config, NOWHERE).topology.roles)
    steps = sum(record.num_tokens for record in many.values()) - one["one", 0].num_tokens
    assert tokens_of_many - tokens_of_one <= num_roles * steps  # no prompt token but the last of each


def test_prompts_share_what_their_system_message_gives(tiny, monkeypatch):
    config = config_of(tiny(), PAIR, decoding={**DECODING, "n": 1}, cluster={"slots": 2})
    shared, tokens_shared = computed(config, ROWS)
    share_nothing(monkeypatch)
    plain, tokens_plain = computed(config, ROWS)
    assert shared == plain
    assembly = assemble(config, NOWHERE)
    prompter, weights = assembly.prompter, assembly.topology.weights
    encoded = prompter.encode(ROWS[0].messages, weights)
    lengths = prompter.shared_prefixes(ROWS[0].messages, encoded)
    assert lengths["kind"] > len(PAIR["kind"]["principle"])
    assert lengths["kind"] < len(encoded["kind"])
    assert tokens_plain - tokens_shared == (len(ROWS) - 1) * sum(lengths.values())


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
def test_sharing_and_long_prompts_in_parts_change_no_answer(tiny, monkeypatch, slots, reproducibility):
    rows = [ask(f"r{at}", "long " * (4 * at % 17) + "x" * at) for at in range(7)]
    decoding = {**DECODING, "n": 2, "reproducibility": reproducibility, "temperature": 0.0}
    many, lone = (
        engine_of(config_of(tiny("mistral"), PAIR, decoding=decoding, cluster={"slots": each}))[0]
        for each in (slots, 1)
    )
    read_in_parts(monkeypatch)
    records = answers(many, rows)
    share_nothing(monkeypatch)
    alone = answers(lone, rows)
    assert len(records) == 2 * len(rows)
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

    def judged():
        """The records, the tokens that went through the reward model, and the rows that it holds afterwards."""
        num_before = num_row_caches()
        replica = RewardReplica.start(config)
        records = {(each.row_id, each.sample): each for each in decode_rows(replica.engine, rows, num_samples=3)}
        return records, replica.runner.num_tokens, num_row_caches() - num_before

    shared, tokens_shared, num_shared_caches = judged()
    share_nothing(monkeypatch)
    plain, tokens_plain, num_plain_caches = judged()
    assert shared == plain
    for num_caches in (num_shared_caches, num_plain_caches):
        assert 0 < num_caches <= 2 * slots  # what rows held that are gone is let go
    # of a prompt, all but the last token is spared for 3 samples and 2 roles; of a prefix, for all but the first row
    spared = 0
    assembly = assemble(config, NOWHERE)
    prompter, weights = assembly.prompter, assembly.topology.weights
    for at, row in enumerate(rows):
        encoded = prompter.encode(row.messages, weights)
        prefix, length = prompter.shared_prefixes(row.messages, encoded)["one"], len(encoded["one"])
        assert 0 < prefix < length - 1
        spared += 5 * (length - 1) + (prefix if at else 0)
    assert tokens_plain - tokens_shared == spared


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize(
    ("kind", "reproducibility"), [("mistral", "strict"), ("mistral", "relaxed"), ("llama", "strict")]
)
def test_a_reward_model_reads_long_prompts_in_parts_to_the_same_answers(
    tiny, judge, monkeypatch, kind, slots, reproducibility
):
    longest = []

    def watched(readings, *args):
        longest.append(max(len(each.trunk) for each in readings))
        return reading(readings, *args)

    monkeypatch.setattr(branch_runner, "reading", watched)
    judges = {"judge": {"kind": "reward_model", "model": str(judge(kind)), "candidates": 4}}
    systems = [None, "be brief " * 5, "be brief " * 5, "be kind"]  # what they begin with takes several parts, too
    rows = [
        replace(row, messages=({"role": "system", "content": system}, *row.messages)) if system else row
        for row, system in zip(
            [ask(f"r{at}", "long " * (4 * at % 17) + "x" * at) for at in range(8)], systems * 2, strict=True
        )
    ]
    decoding = {**DECODING, "n": 2, "reproducibility": reproducibility, "temperature": 0.0}
    many, lone = (
        engine_of(config_of(tiny(), judges, decoding=decoding, cluster={"slots": each}))[0] for each in (slots, 1)
    )
    read_in_parts(monkeypatch)
    longest.clear()
    records = answers(many, rows)
    assert max(longest) == 16
    share_nothing(monkeypatch)
    alone = answers(lone, rows)
    assert len(records) == 2 * len(rows)
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
