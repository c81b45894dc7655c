"""Other methods' rules, written down as their authors publish them, against runs with the settings that docs name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.preference_adapters import make_preference_adapter, merged
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.aligner import Aligner

WEIGHTS = {"helpful": 0.6, "harmless": 0.4}
PROMPT = "what is ice made of?"
SETTINGS = {"candidates": "all", "max_new_tokens": 6, "trace": "tokens", "slots": 2}


@torch.no_grad()
def logprobs_of(model: Path | torch.nn.Module, tokenizer_of: Path, answer: Sequence[int]) -> Tensor:
    """Log-probabilities [T, V] of a plain pass at each token of the answer to PROMPT."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    module = AutoModelForCausalLM.from_pretrained(model).eval() if isinstance(model, Path) else model
    logits_TV = module(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.double().log_softmax(-1)


@pytest.fixture(scope="module")
def models(tiny) -> Mapping[str, Path]:
    return {"base": tiny("llama"), "helpful": tiny("llama", seed=1), "harmless": tiny("llama", seed=2)}


def answer_of(models: Mapping[str, Path], kind: str = "arm", *, reference: str = "none", **decoding):
    """The tokens of an answer, and the log-probability that the run's policy gave each."""
    names = [name for name in models if name != "base"]
    principals = {
        name: {
            "kind": kind,
            "model": str(models[name]),
            "reference": str(models["base"]) if reference == "base" else reference,
            "weight": WEIGHTS[name],
        }
        for name in names
    }
    with Aligner(str(models["base"]), principals, **{**SETTINGS, **decoding}) as aligner:
        (answer,) = aligner.generate([PROMPT])
    return [each.token_id for each in answer.tokens], [each.logprob for each in answer.tokens]


def at(policy_TV: Tensor, tokens: Sequence[int]) -> list[float]:
    return policy_TV[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()


def test_genarm(models):
    """The mean of the logits, (log p_base + sum alpha log p_ARM) / (1 + sum alpha), at 1 / (1 + sum alpha)."""
    tokens, found = answer_of(models, rule="linear", agent_temperature=1.0)
    plain = {name: logprobs_of(folder, folder, tokens) for name, folder in models.items()}
    total = 1 + sum(WEIGHTS.values())
    mean_TV = (plain["base"] + sum(alpha * plain[name] for name, alpha in WEIGHTS.items())) / total
    assert found == pytest.approx(at((mean_TV * total).log_softmax(-1), tokens), abs=1e-4)


@pytest.mark.parametrize("rule", ["linear", "forward_kl", "jensen_shannon"])
def test_mod(models, rule):
    """pi ~ pi_0 g(sum_j w_j f'(pi_j / pi_0)), where g is the inverse of f', for the three common divergences."""
    tokens, found = answer_of(models, "tuned_pair", reference="base", rule=rule, agent_temperature=1.0)
    plain = {name: logprobs_of(folder, folder, tokens) for name, folder in models.items()}
    ratios = {name: (plain[name] - plain["base"]).exp() for name in WEIGHTS}
    f_prime, inverse = {
        "linear": (torch.log, torch.exp),
        "forward_kl": (lambda x: -1 / x, lambda y: -1 / y),
        "jensen_shannon": (lambda x: (2 * x / (1 + x)).log(), lambda y: y.exp() / (2 - y.exp())),
    }[rule]
    mixed_TV = inverse(sum(weight * f_prime(ratios[name]) for name, weight in WEIGHTS.items()))
    policy_TV = (plain["base"] + mixed_TV.log()).log_softmax(-1)
    assert found == pytest.approx(at(policy_TV, tokens), abs=1e-4)


def test_parm(tiny, tmp_path):
    """The likeliest token of log p_base + log p_ARM, the ARM at the preference vector; and its probability."""
    base = tiny("llama")
    adapter = make_preference_adapter(tmp_path / "parm", base)
    principals = {
        name: {
            "kind": "preference_arm", "adapter": str(adapter), "objective": at,
            "reference": "none", "weight": weight,
        }
        for at, (name, weight) in enumerate(WEIGHTS.items())
    }  # fmt: skip
    options = {**SETTINGS, "rule": "parm", "agent_temperature": 1.0, "temperature": 0}
    with Aligner(str(base), principals, **options) as aligner:
        (answer,) = aligner.generate([PROMPT])
    tokens = [each.token_id for each in answer.tokens]
    arm = merged(base, adapter, list(WEIGHTS.values()))
    summed_TV = logprobs_of(base, base, tokens) + logprobs_of(arm, base, tokens)
    assert tokens == summed_TV.argmax(-1).tolist()


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_rmod(models, strength):
    """Of each set of blocks, the best under the weights that minimise the mean of exp(lambda w . v)."""
    principals = {
        name: {"kind": "arm", "model": str(models[name]), "reference": "none", "weight": 1} for name in WEIGHTS
    }
    with Aligner(
        str(models["base"]), principals, unit="block", block_tokens=3, proposals=6, max_new_tokens=9, rule="maximin",
        agent_temperature=1 / strength, temperature=0, slots=2,
    ) as aligner:  # fmt: skip
        (answer,) = aligner.generate([PROMPT])
    games: dict[int, list] = {}
    for each in answer.proposals:
        games.setdefault(each.game, []).append(each)
    assert len(games) > 1
    for blocks in games.values():
        values = torch.tensor([[each.rewards[name] for name in WEIGHTS] for each in blocks], dtype=torch.float64)
        counts = torch.tensor([each.count for each in blocks], dtype=torch.float64)
        grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
        scores_GK = grid[:, None] * values[:, 0] + (1 - grid)[:, None] * values[:, 1]
        worst = int(torch.logsumexp(strength * scores_GK + counts.log(), -1).argmin())
        best = int((strength * scores_GK[worst] + counts.log()).argmax())
        assert blocks[best].is_chosen


def test_the_rules_differ_where_principals_disagree(models):
    """Otherwise the tests above would hold for any of them."""
    found = {
        rule: answer_of(models, "tuned_pair", reference="base", rule=rule, agent_temperature=1.0, seed=3)[1]
        for rule in ("linear", "mixture", "forward_kl", "jensen_shannon", "equilibrium")
    }
    firsts = [each[0] for each in found.values()]
    assert all(not math.isclose(one, other, abs_tol=1e-3) for one, other in pairwise(firsts))
