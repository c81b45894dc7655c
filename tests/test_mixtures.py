"""Mixtures of experts: a row's bits do not depend on which experts other rows chose, nor how many chose one."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.decoding import NOWHERE, ask, config_of, decode
from support.families import generated_logprobs, make_family
from support.lora import make_lora
from transformers import AutoModelForCausalLM

from pipeline.runtime.assembly import assemble
from pipeline.worker.experts import padded_experts

# routed experts alone; with shared ones behind a gate; in groups; with biases; with a loop of its own
FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "dbrx"]
PRINCIPALS = {"kind": {"kind": "prompted", "principle": "Be kind.", "weight": 0.6}}
DECODING = {"max_new_tokens": 6, "trace": "tokens", "agent_temperature": 0.7, "candidates": "all", "temperature": 1.1}
ROWS = [ask(f"r{at}", "tell me " * (at % 4) + "x" * (5 * at % 11 + 1)) for at in range(17)]


def assert_rows_are_their_own(folder, principals):
    """Every number of every row is the same for any number of slots and in any order."""

    def records(slots, rows):
        return decode(config_of(folder, principals, decoding=DECODING, cluster={"slots": slots}), rows)

    reference = records(16, ROWS)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert len({record.response for record in reference.values()}) > 12
    for slots, rows in ((1, ROWS[:5]), (3, ROWS[9:3:-1]), (9, shuffled), (16, shuffled)):
        for row_id, record in records(slots, rows).items():
            assert record.error is None
            assert record == reference[row_id]
    return reference


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_mixture_are_the_same_to_the_bit_for_any_slots_and_order(name, tmp_path):
    assert_rows_are_their_own(make_family(tmp_path, name), PRINCIPALS)


def test_experts_with_equal_scores_are_chosen_as_transformers_chooses_and_strictly(tmp_path):
    """A router of zeros gives every expert the same score."""
    folder = make_family(tmp_path, "mixtral")
    weights = load_file(folder / "model.safetensors")
    routers = [name for name in weights if name.endswith("gate.weight")]
    assert routers
    save_file(weights | {name: torch.zeros_like(weights[name]) for name in routers}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    records = assert_rows_are_their_own(folder, PRINCIPALS)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompter = assemble(config_of(folder, PRINCIPALS), NOWHERE).prompter
    for row in ROWS[:4]:
        answer = [token.token_id for token in records[row.row_id].tokens]
        prompt = prompter.encode(row.messages, {"kind": 0.6})["base"]
        expected = generated_logprobs(model, prompt, answer).tolist()
        assert [token.base_logprob for token in records[row.row_id].tokens] == pytest.approx(expected, abs=1e-3)


def test_an_adapter_beside_a_mixture_leaves_all_bits_their_own(tmp_path):
    folder = make_family(tmp_path / "model", "qwen2_moe")
    adapter = make_lora(tmp_path / "adapter", folder, "q_proj", "o_proj", r=1)
    arm = {"kind": "arm", "adapter": str(adapter), "reference": "backbone", "weight": 0.5}
    assert_rows_are_their_own(folder, {**PRINCIPALS, "arm": arm})


class Experts:
    """Weights of experts as transformers keeps them."""

    has_gate, has_bias, is_transposed = True, False, False
    act_fn = torch.nn.functional.relu

    def __init__(self, num_experts, width, inner):
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = torch.randn(num_experts, 2 * inner, width, generator=generator)
        self.down_proj = torch.randn(num_experts, width, inner, generator=generator)

    def _apply_gate(self, states):
        gate, up = states.chunk(2, -1)
        return gate.relu() * up


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 33])
def test_padded_experts_give_the_weighted_sum_of_those_chosen(num_tokens):
    experts = Experts(6, 40, 24)
    generator = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(num_tokens, 40, generator=generator)
    chosen = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(num_tokens)])  # 6: none
    weights = torch.rand(num_tokens, 3, generator=generator)
    found = padded_experts(experts, states, chosen, weights)
    for at in range(num_tokens):
        expected = torch.zeros(40)
        for expert, weight in zip(chosen[at].tolist(), weights[at], strict=True):
            if expert < 6:
                inner = experts._apply_gate(experts.gate_up_proj[expert] @ states[at])
                expected += weight * (experts.down_proj[expert] @ inner)
        torch.testing.assert_close(found[at], expected, atol=2e-3, rtol=1e-5)
        alone = padded_experts(experts, states[at : at + 1], chosen[at : at + 1], weights[at : at + 1])
        assert torch.equal(alone[0], found[at])
