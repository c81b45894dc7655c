"""The decoder against independent loops and against transformers' own generation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoding import ask, config_of, decode, engine_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.engine.engine import decode_rows
from pipeline.sampling.draws import Uniforms

ROWS = [ask(f"r{at}", "tell me " * at + "something?") for at in range(7)]
ZERO = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0},
}
PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


@cache
def generate(folder: Path, text: str, max_new_tokens: int) -> tuple[str, int]:
    tokenizer, model = loaded(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)[
        0, ids.shape[1] :
    ]
    return tokenizer.decode(answer, skip_special_tokens=True), len(answer)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3", "mistral", "neox"])
@pytest.mark.parametrize("rule", ["base", "equilibrium"])
def test_weights_of_zero_give_the_greedy_tokens_of_generate(tiny, kind, rule):
    folder = tiny(kind, seed=3)
    decoding = {"rule": rule, "temperature": 0, "max_new_tokens": 40}
    records = decode(config_of(folder, ZERO, decoding=decoding, cluster={"slots": 3}), ROWS)
    for row in ROWS:
        expected = generate(folder, row.messages[0]["content"], 40)
        assert (records[row.row_id].response, records[row.row_id].num_tokens) == expected


@pytest.mark.slow
def test_the_embedded_model_greedy_equals_generate(cache_folder):
    from pipeline.hub.embedded import prepare_embedded

    folder = prepare_embedded(cache_folder)
    rows = [ask("a", "Why is the sky blue?"), ask("b", "Name three fruits."), ask("c", "Hi!")]
    decoding = {"rule": "base", "temperature": 0, "max_new_tokens": 12}
    records = decode(config_of("smollm2-135m", ZERO, decoding=decoding), rows, cache_folder)
    for row in rows:
        expected = generate(folder, row.messages[0]["content"], 12)
        assert (records[row.row_id].response, records[row.row_id].num_tokens) == expected


def plain_linear_loop(folder: Path, text: str, row_id: str, tau: float, steps: int, k: int, seed: int) -> list[int]:
    """softmax(log pi0 + sum_j w_j q_j / tau) over the base's top k, one row, no cache, no library of ours but the
    documented draw."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def prompt(principle: str | None) -> list[int]:
        messages = [{"role": "system", "content": principle}] if principle else []
        messages.append({"role": "user", "content": text})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logprobs(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    uniforms = Uniforms(seed, row_id, 0)
    answer: list[int] = []
    for step in range(steps):
        base = logprobs(prompt(None) + answer)
        top = base.topk(k).indices
        score = base[top]
        for principal in PAIR.values():
            score = (
                score + principal["weight"] * (logprobs(prompt(principal["principle"]) + answer) - base)[top] / tau
            )
        cumulative = score.softmax(-1).cumsum(-1)
        at = int((cumulative <= uniforms.at(step) * cumulative[-1]).sum())
        answer.append(int(top[at]))
        if answer[-1] == tokenizer.eos_token_id:
            break
    return answer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rule_linear_equals_a_plain_loop(tiny, kind):
    folder = tiny(kind, seed=3)
    decoding = {
        "rule": "linear", "agent_temperature": 0.8, "candidates": 20, "max_new_tokens": 12, "seed": 5,
        "trace": "tokens",
    }  # fmt: skip
    records = decode(config_of(folder, PAIR, decoding=decoding, cluster={"slots": 4}), ROWS[:4])
    for row in ROWS[:4]:
        expected = plain_linear_loop(folder, row.messages[0]["content"], row.row_id, 0.8, 12, 20, 5)
        assert [token.token_id for token in records[row.row_id].tokens] == expected


def test_one_forward_pass_per_step_whatever_the_number_of_principals(tiny):
    principals = {f"p{at}": {"kind": "prompted", "principle": f"be {at}"} for at in range(5)}
    config = config_of(tiny(), principals, decoding={"max_new_tokens": 9, "rule": "base"}, cluster={"slots": 4})
    engine, assembly = engine_of(config)
    records = list(decode_rows(engine, ROWS[:4]))
    assert len(assembly.hosts) == len(engine.calls.hosts.all) == 1
    assert engine.calls.hosts.sampler.work().result().num_forwards == max(record.num_tokens for record in records)


@pytest.fixture(scope="module")
def ascii_model(tiny, tmp_path_factory) -> Path:
    """A tiny model that prefers ASCII, so that its answers encode back to the tokens that they were decoded from."""
    source, folder = tiny("llama", seed=3), tmp_path_factory.mktemp("ascii")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    texts = [tokenizer.decode([token_id]) for token_id in range(len(tokenizer))]
    others = [at for at, text in enumerate(texts) if not (text.isascii() and text.isprintable() and len(text) == 1)]
    others.remove(tokenizer.eos_token_id)
    with torch.no_grad():  # a logit of 0, where the likeliest of the others have ten and more
        model.get_output_embeddings().weight[others] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("candidates", [20, "all"])
def test_rewards_of_an_answer_equal_those_of_the_same_answer_scored_by_teacher_forcing(ascii_model, candidates):
    decoding = {"max_new_tokens": 400, "candidates": candidates, "temperature": 1.5, "agent_temperature": 2.0}
    config = config_of(ascii_model, PAIR, decoding=decoding)
    first = decode(config, ROWS)
    # one that was cut off has no end token, and text that is not ASCII may encode to other tokens
    whole = [
        row for row in ROWS if first[row.row_id].finish_reason == "stop" and first[row.row_id].response.isascii()
    ]
    assert len(whole) >= 3
    again = decode(config, [replace(row, response=first[row.row_id].response) for row in whole])
    for row in whole:
        assert again[row.row_id].rewards == first[row.row_id].rewards
        assert again[row.row_id].original_rewards == pytest.approx(first[row.row_id].rewards, abs=1e-3)
