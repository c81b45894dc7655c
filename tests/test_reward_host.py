"""Reward hosts: branches of any shape, repeated and lost calls, models and texts that they refuse."""

from __future__ import annotations

import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.decoding import ask, config_of, decode, engine_of
from support.reward_hosts import RewardReplica
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from pipeline.attention.branches import RowCache
from pipeline.engine.engine import decode_rows
from pipeline.errors import ConfigurationError, StateLost
from pipeline.protocol import messages
from pipeline.protocol.messages import Admission, Candidates, Position, Step
from pipeline.worker import branch_runner, language_model_runner
from pipeline.worker.branch_rows import lay_out

ROWS = [ask(f"r{at}", text) for at, text in enumerate(["why?", "tell me a story", "hi", "and then what is it?"])]
DECODING = {"max_new_tokens": 7, "candidates": 20, "agent_temperature": 0.7, "seed": 3, "trace": "tokens"}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_any_text_before_and_after_another_is_scored_as_if_read_alone(tiny, judge, kind):
    folder = judge(kind)
    principals = {"judge": {"kind": "reward_model", "model": str(folder)}}
    runner = RewardReplica.start(config_of(tiny("llama"), principals)).runner
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    draw = random.Random(3)

    def sequence(longest):
        return [draw.choice((7, 8)) for _ in range(draw.randint(1, longest))]

    @torch.inference_mode()
    def alone(ids):
        return float(model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]))

    cache, known = RowCache(), None
    with torch.inference_mode():
        for _ in range(25):
            stem = [8] * draw.randint(1, 30)  # longer than the window
            prefix, continuations = [*stem, *sequence(6)], [[*stem, *sequence(9)] for _ in range(3)]
            continuations += [prefix, prefix[:-1] or prefix, [*prefix, 9]]
            reading, places = lay_out(cache, prefix, continuations)
            [states_TH] = runner.read([(reading, 0)])
            scores_TL = model.score(states_TH)
            known = float(scores_TL[len(reading.trunk) - 1]) if reading.trunk else known
            assert cache.tokens == prefix
            found = [known if place is None else float(scores_TL[place]) for place in places]
            assert found == pytest.approx([alone(ids) for ids in continuations], abs=1e-3)
            assert known == pytest.approx(alone(prefix), abs=1e-3)


def proposal(*ids):
    """One row's candidates, most likely first."""
    base_BK = -torch.arange(1.0, len(ids) + 1)[None]
    return Candidates(torch.tensor([ids]), base_BK, base_BK.exp().sum(-1), base_BK[:, None])


class Judged:
    """A reward model's host with one row that has said nothing yet."""

    def __init__(self, tiny, judge, **options):
        principals = {"judge": {"kind": "reward_model", "model": str(judge(**options)), "candidates": 3}}
        replica = RewardReplica.start(config_of(tiny("llama"), principals, cluster={"slots": 2}))
        self.host, self.at = replica.host, Position(0, 7, 0)
        self.host.advance(self.at, Step([Admission(1, {"judge": [5, 6, 7]})]))

    def step(self, token):
        self.at = self.at.after
        self.host.advance(self.at, Step(slots=[1], tokens=[token]))

    def ask(self, *ids):
        return self.host.values_at(self.at, [1], [0], proposal(*ids))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_repeated_call_gets_the_same_bits_and_another_position_is_lost(tiny, judge, pairs):
    judged = Judged(tiny, judge, pairs=pairs)
    first = judged.ask(70, 71, 0)
    assert torch.equal(judged.ask(70, 71, 0), first)
    judged.step(70)
    judged.host.advance(judged.at, Step(slots=[1], tokens=[70]))  # repeated: nothing is appended twice
    later = judged.ask(70, 71, 0)
    assert not torch.equal(later, first)
    second = judged.ask(80, 81)
    assert torch.equal(judged.ask(80, 81), second)
    assert torch.allclose(judged.ask(81, 80).flip(-1), second, atol=1e-4)
    with pytest.raises(StateLost):
        judged.host.values_at(judged.at.after, [1], [0], proposal(1))
    judged.host.resize(2)
    with pytest.raises(StateLost):
        judged.ask(80, 81)
    again = Judged(tiny, judge, pairs=pairs)
    assert torch.equal(again.ask(70, 71, 0), first)
    again.step(70)
    assert torch.equal(again.ask(70, 71, 0), later)
    assert torch.equal(again.ask(80, 81), second)


@pytest.mark.parametrize(("pairs", "reproducibility"), [(True, "strict"), (True, "relaxed"), (False, "relaxed")])
def test_a_lost_state_changes_no_token(tiny, judge, monkeypatch, pairs, reproducibility):
    principals = {"judge": {"kind": "reward_model", "model": str(judge(pairs=pairs))}}
    decoding = {**DECODING, "max_new_tokens": 6, "reproducibility": reproducibility}
    config = config_of(tiny("llama"), principals, decoding=decoding, cluster={"slots": 2})
    undisturbed, replica = RewardReplica.start(config), RewardReplica.start(config)
    for module in (messages, language_model_runner, branch_runner):
        monkeypatch.setattr(module, "CHUNK", 8)  # so that rows come back in parts; models are loaded before
    expected = {record.row_id: record for record in decode_rows(undisturbed.engine, ROWS)}
    engine = replica.engine
    records, waiting = {}, list(ROWS)
    for turn in range(1000):
        while engine.wants_row and waiting:
            engine.admit(waiting.pop(0))
        if turn in (3, 9):
            replica.host.resize(2)
        records |= {record.row_id: record for record in engine.step()}
        if engine.is_idle and not waiting:
            break
    assert engine.recoveries.states_lost == 2
    assert records.keys() == expected.keys()
    for row in ROWS:
        tokens = [[token.token_id for token in each[row.row_id].tokens] for each in (expected, records)]
        assert tokens[0] == tokens[1]
        assert records[row.row_id].rewards["judge"] == pytest.approx(expected[row.row_id].rewards["judge"], abs=1e-3)
        if reproducibility == "strict":
            assert records[row.row_id] == expected[row.row_id]


def test_what_is_too_long_for_the_reward_model_rejects_its_row_alone(judge, tmp_path):
    base = tiny_models.make_model(tmp_path, tokenizer=tiny_models.make_pair_tokenizer())
    principals = {"judge": {"kind": "reward_model", "model": str(judge("gpt2", context=64))}}
    # its tokens are single bytes: the context holds fewer of them than of the base's
    rows = [ask("short", "hi"), ask("long", "x" * 50), ask("old", "hi", response="a long answer" * 6)]
    records = decode(config_of(base, principals, decoding=DECODING), rows)
    assert records["short"].error is None
    assert "longer than the context of a reward model" in records["long"].error
    assert records["old"].error is None
    assert records["old"].chosen is None


def refused(tiny, folder, **fields):
    principals = {"judge": {"kind": "reward_model", "model": str(folder), **fields}}
    with pytest.raises(ConfigurationError) as caught:
        engine_of(config_of(tiny("llama"), principals))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_is_no_reward_model_is_refused_with_the_reason(tiny, judge, tmp_path):
    assert "hold no head that gives scores; it needs a sequence classifier" in refused(tiny, tiny("llama"))
    assert "label is missing: the model has 3 outputs, 0 (LABEL_0)" in refused(tiny, judge(num_labels=3))
    assert "label must be one of 0 (LABEL_0)" in refused(tiny, judge(), label=1)
    silent = tiny_models.make_reward_model(
        tmp_path / "silent", tokenizer=tiny_models.make_tokenizer(chat_template=None)
    )
    assert "template is missing" in refused(tiny, silent)
    assert "interval must be greater than or equal to 1" in refused(tiny, judge(), interval=0)
    assert "sign must be 1 or -1" in refused(tiny, judge(), sign=2)


def test_a_classifier_without_a_trained_head_or_that_reads_both_ways_is_refused(tiny, tmp_path):
    headless = tiny_models.make_reward_model(tmp_path / "headless")
    weights = headless / "model.safetensors"
    tensors = load_file(weights)
    del tensors["score.weight"]
    save_file(tensors, weights, {"format": "pt"})
    assert re.search(r"its files lack .*score\.weight.*, which would be random", refused(tiny, headless))
    both = tmp_path / "both"
    config = BertConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(both)
    tiny_models.make_tokenizer().save_pretrained(both)
    assert "cannot be used" in refused(tiny, both)
