"""Sequence reward models as principals, against uncached scoring of every candidate."""

from __future__ import annotations

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of, decode
from support.reward_hosts import RewardReplica
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import cage
from jobs.commands.plan import describe_plan
from pipeline.attention.branches import reading
from pipeline.engine.engine import decode_rows
from pipeline.runtime.replica_plan import plan_replica
from pipeline.sampling.draws import Uniforms
from pipeline.stages.relabel import prepare
from pipeline.worker import branch_runner

ROWS = [ask(f"r{at}", text) for at, text in enumerate(["why?", "tell me a story", "hi", "and then what is it?"])]
DECODING = {"max_new_tokens": 7, "candidates": 20, "agent_temperature": 0.7, "seed": 3, "trace": "tokens"}


class PlainJudge:
    """Scores text or tokens by whole forward passes without a cache, pooled at the last token."""

    def __init__(self, folder, base_tokenizer, *, on_text):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base_tokenizer, self.on_text = base_tokenizer, on_text

    def answer_ids(self, answer):
        if not self.on_text:
            return list(answer)
        ended = answer[-1:] == [self.base_tokenizer.eos_token_id]
        text = self.base_tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)
        ids = self.tokenizer(text.rstrip("\ufffd"), add_special_tokens=False)["input_ids"]
        return ids + [self.tokenizer.eos_token_id] * ended

    @torch.no_grad()
    def score(self, question, answer, label=0):
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + self.answer_ids(answer)
        hidden = self.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(self.model.score(hidden)[label])


def plain_loop(config, row, folders, judge):
    """Decode one row with whole forward passes: a prompted principal, a tuned pair and a reward model."""
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    base, before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
    principals, decoding = config.principals, config.decoding
    terms = principals["judge"]
    question = row.messages[0]["content"]

    def prompt(principle=None):
        messages = [{"role": "system", "content": principle}] if principle else []
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logprobs(model, ids):
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    uniforms, answer, total = Uniforms(decoding.seed, row.row_id, 0), [], 0.0
    while len(answer) < decoding.max_new_tokens and answer[-1:] != [tokenizer.eos_token_id]:
        plain = logprobs(base, prompt() + answer)
        top = plain.topk(decoding.candidates).indices
        kind = (logprobs(base, prompt("be kind") + answer) - plain)[top]
        pair = (logprobs(after, prompt() + answer) - logprobs(before, prompt() + answer))[top]
        scored = torch.zeros(len(top), dtype=torch.float64)
        if len(answer) % terms.interval == 0:
            now = judge.score(question, answer, terms.label or 0)
            gains = [
                terms.sign * terms.scale * (judge.score(question, [*answer, int(token)], terms.label or 0) - now)
                for token in top[: terms.candidates]
            ]
            scored = torch.tensor(gains + [min(gains)] * (len(top) - len(gains)), dtype=torch.float64)
        q_JK = torch.stack([kind, pair, scored])
        weights_J = torch.tensor([principal.weight for principal in principals.values()], dtype=torch.float64)
        game = cage.Game(
            plain[top].log_softmax(-1)[None], (weights_J[:, None] * q_JK)[None], decoding.agent_temperature
        )
        cumulative = cage.solve(game).policy[0].cumsum(-1)
        at = int((cumulative <= uniforms.at(len(answer)) * cumulative[-1]).sum())
        answer.append(int(top[at]))
        total += float(scored[at])
    return answer, total


def mixed(tiny, folder, **fields):
    """A base, and a prompted principal, a tuned pair and a reward model beside it."""
    folders = [tiny("llama", seed=seed) for seed in (0, 1, 2)]
    return folders, {
        "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.5},
        "pair": {"kind": "tuned_pair", "model": str(folders[2]), "reference": str(folders[1]), "weight": 0.2},
        "judge": {"kind": "reward_model", "model": str(folder), "weight": 0.8, **fields},
    }


CASES = [
    ("llama", {}, {}),
    ("gpt2", {"pad_id": None}, {"candidates": 5}),
    ("qwen2", {"num_labels": 3}, {"label": 2, "sign": -1, "scale": 0.5, "candidates": 5}),
    ("mistral", {"pairs": True}, {"candidates": 5}),  # a window of 24 tokens
    ("neox", {}, {"interval": 3}),
    ("gemma2", {"pairs": True}, {"interval": 2, "candidates": 40}),  # a softcap, and windows in every other layer
]


@pytest.mark.parametrize(("kind", "options", "fields"), CASES)
def test_answers_are_those_of_uncached_scoring_token_for_token(tiny, judge, kind, options, fields):
    folder = judge(kind, **options)
    folders, principals = mixed(tiny, folder, **fields)
    config = config_of(folders[0], principals, decoding=DECODING, cluster={"slots": 3})
    relaxed = config_of(
        folders[0], principals, decoding={**DECODING, "reproducibility": "relaxed"}, cluster={"slots": 3}
    )
    records, faster = decode(config, ROWS), decode(relaxed, ROWS)
    plain = PlainJudge(folder, AutoTokenizer.from_pretrained(folders[0]), on_text=options.get("pairs", False))
    for row in ROWS[1:3]:
        answer, total = plain_loop(config, row, folders, plain)
        for record in (records[row.row_id], faster[row.row_id]):
            assert [token.token_id for token in record.tokens] == answer
            assert record.rewards["judge"] == pytest.approx(total, abs=2e-3)


@pytest.mark.parametrize("candidates", [1, 10])
@pytest.mark.parametrize(("kind", "pairs"), [("llama", False), ("llama", True), ("gpt2", False), ("mistral", False)])
def test_a_strict_row_has_the_same_bits_in_any_batch(tiny, judge, kind, pairs, candidates):
    base = tiny("llama")
    judged = {"kind": "reward_model", "model": str(judge(kind, pairs=pairs)), "candidates": candidates}
    many, alone, other = (
        config_of(base, {"judge": judged}, decoding=DECODING, cluster={"slots": slots}) for slots in (4, 1, 3)
    )
    expected = decode(many, ROWS)
    assert decode(alone, list(reversed(ROWS))) == expected
    assert decode(other, [ROWS[2], ROWS[0], ROWS[1], *ROWS[3:]]) == expected


@pytest.mark.parametrize("options", [{}, {"pairs": True, "candidates": 1}])
def test_passes_of_one_shape_give_the_same_bits_in_any_batch(tiny, judge, monkeypatch, options):
    """As strict passes are on a GPU; a row with more tokens than a pass is alone, and some have nothing to read."""
    fields = dict(options)
    pairs = fields.pop("pairs", False)
    shapes = []

    def watched(readings, *args):
        shapes.append(sum(len(each.tokens) for each in readings))
        return reading(readings, *args)

    monkeypatch.setattr(branch_runner, "reading", watched)
    monkeypatch.setattr(branch_runner, "PASS_TOKENS", 32)
    monkeypatch.setattr(branch_runner.BranchRunner, "_has_one_shape", True)
    principals = {"judge": {"kind": "reward_model", "model": str(judge(pairs=pairs)), **fields}}
    rows = [*ROWS, ask("long", "tell me more " * (10 if pairs else 5))]
    configs = [
        config_of(tiny("llama"), principals, decoding=DECODING, cluster={"slots": slots}) for slots in (5, 1, 3)
    ]
    expected, alone, other = (decode(config, rows) for config in configs)
    assert alone == other == expected
    assert {shape % 32 for shape in shapes} == {0}
    assert 32 in shapes
    assert max(shapes) > 64
    monkeypatch.setattr(branch_runner.BranchRunner, "_has_one_shape", False)
    for row_id, record in decode(configs[0], rows).items():
        assert record.response == expected[row_id].response


@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
def test_a_step_is_one_pass_and_principals_on_the_same_weights_share_it(tiny, judge, reproducibility):
    folder = str(judge(num_labels=2))
    principals = {
        "one": {"kind": "reward_model", "model": folder, "label": 0},
        "two": {"kind": "reward_model", "model": folder, "label": 1, "interval": 2, "candidates": 4},
    }
    decoding = {**DECODING, "reproducibility": reproducibility}
    replica = RewardReplica.start(config_of(tiny("llama"), principals, decoding=decoding, cluster={"slots": 4}))
    records = list(decode_rows(replica.engine, ROWS))
    assert len(records) == len(ROWS)
    assert [(plan.name, plan.serves) for plan in replica.assembly.topology.hosts[1:]] == [("one", ("one", "two"))]
    num_steps = max(record.num_tokens for record in records)
    # and two for prompts: what they begin with in common is read first, then copied
    assert replica.runner.num_forwards == 2 + num_steps
    assert all(0 not in record.rewards.values() for record in records)


@pytest.mark.parametrize(("pairs", "interval"), [(False, 1), (True, 1), (True, 3)])
def test_an_existing_answer_is_scored_as_a_decoded_one_is(tiny, judge, pairs, interval):
    base, folder = tiny("llama"), judge(pairs=pairs)
    principals = {
        "judge": {"kind": "reward_model", "model": str(folder), "interval": interval, "scale": 2.0, "sign": -1}
    }
    row = ask("a", "hello", response="goöd day, 日本")
    record = decode(config_of(base, principals, decoding=DECODING), [row])["a"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = PlainJudge(folder, tokenizer, on_text=pairs)
    answer = [*tokenizer(row.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    scores = [plain.score("hello", answer[:count]) for count in range(len(answer) + 1)]
    expected = sum(scores[at + 1] - scores[at] for at in range(0, len(answer), interval))
    assert record.original_rewards["judge"] == pytest.approx(-2.0 * expected, abs=5e-3)


def test_the_plan_says_what_is_scored_and_on_text_at_which_cost(tiny, judge, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "hello"}\n')
    principals = {
        "same": {"kind": "reward_model", "model": str(judge()), "interval": 4, "scale": 0.5, "sign": -1},
        "other": {"kind": "reward_model", "model": str(judge(pairs=True)), "candidates": 7},
        "ended": {"kind": "reward_model", "model": str(judge()), "candidates": 6, "pooling": "end_of_text"},
    }
    config = config_of(tiny("llama"), principals, input={"path": str(tmp_path / "prompts.jsonl")})
    config = config.model_copy(update={"output": config.output.model_copy(update={"path": str(tmp_path / "run")})})
    prepared = prepare(config, NOWHERE)
    text = describe_plan(prepared.plan, plan_replica(config, prepared.models, NOWHERE))
    assert "-0.5 (RM(prefix + a) - RM(prefix)), top 10, every 4 tokens" in text
    assert "RM(prefix + a) - RM(prefix), top 7, every token" in text
    assert "RM(prefix + a) - RM(prefix), top 6, every token, each as if the answer ended there" in text
    assert "other is scored on text" in text
    assert "8 texts per row and scored step" in text
    assert "same is scored on text" not in text
