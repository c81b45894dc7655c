"""Configurations that one family's checkpoints may have: decoded as generate decodes them, strictly, or refused."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of, decode
from support.families import generated_logprobs, make_family
from transformers import AutoModelForCausalLM

from jobs.families.configurations import FAMILIES
from jobs.families.measure import generated, greedy, host_spec
from pipeline.errors import ConfigurationError
from pipeline.hub.families import PLAIN, SLOTS
from pipeline.runtime.assembly import assemble
from pipeline.worker.loading import load_language_model

ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + at for at in range(8)],
        "original_max_position_embeddings": 40, "factor": 4.0,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}  # fmt: skip
# a family, settings, and how it is decoded; prompts and answers reach beyond every window and original context
CASES = [
    *[("llama", {"rope_parameters": {"rope_theta": 1e4, **rope}}, PLAIN if name == "longrope" else SLOTS)
      for name, rope in ROPE.items()],
    ("llama", {"num_key_value_heads": 1, "head_dim": 24, "attention_bias": True, "mlp_bias": True}, SLOTS),
    ("llama", {"num_hidden_layers": 3, "tie_word_embeddings": True, "intermediate_size": 100}, SLOTS),
    ("mistral", {"sliding_window": None}, SLOTS),
    ("mistral", {"sliding_window": 2}, SLOTS),
    ("mistral", {"sliding_window": 1}, PLAIN),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, SLOTS),
    ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, SLOTS),
    ("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": True, "moe_intermediate_size": 20}, SLOTS),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "n_group": 2}, SLOTS),
    ("smollm3", {"no_rope_layers": [0, 0], "use_sliding_window": False}, SLOTS),
    ("phi", {"partial_rotary_factor": 0.25, "qk_layernorm": True}, SLOTS),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    """Configurations this small make transformers warn of sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def set_family(monkeypatch, name, settings):
    family = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, dataclasses.replace(family, settings={**family.settings, **settings}))


@pytest.mark.parametrize(("name", "settings", "decoding"), CASES, ids=str)
def test_a_configuration_is_decoded_as_generate_decodes_it_and_strictly(
    name, settings, decoding, tmp_path, monkeypatch
):
    set_family(monkeypatch, name, settings)
    folder = make_family(tmp_path, name)
    loaded = load_language_model(host_spec(folder))
    assert loaded.decoding == decoding
    expected = generated(name, folder)
    answers, bits = greedy(loaded.runner, range(len(expected)))
    assert answers == expected
    for row in (0, 1):
        loaded.runner.resize(1)
        [answer], [own_bits] = greedy(loaded.runner, [row])
        assert answer == expected[row]
        assert torch.equal(own_bits, bits[row])


def test_a_window_of_nothing_is_refused_in_one_line(tmp_path, monkeypatch):
    folder = make_family(tmp_path, "mistral")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.sliding_window = 0
    model.config.save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"architecture mistral, cannot be decoded: \w+Error: "):
        load_language_model(host_spec(folder))


def test_a_cache_with_a_window_and_masks_without_one_are_decoded_as_generate_decodes_them(tmp_path, monkeypatch):
    name = "qwen3_omni_moe_thinker"
    family = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, dataclasses.replace(family, parts={"text_config": {"sliding_window": 24}}))
    folder = make_family(tmp_path, name)
    loaded = load_language_model(host_spec(folder))
    assert loaded.decoding == PLAIN
    assert "names a window that its masks do not have" in loaded.why_plain
    answers, _ = greedy(loaded.runner, range(3))
    assert answers == generated(name, folder)


def test_with_dynamic_rope_rows_end_where_its_frequencies_would_change(tmp_path, monkeypatch):
    rope = {"rope_theta": 1e4, **ROPE["dynamic"]}
    set_family(monkeypatch, "llama", {"rope_parameters": rope, "max_position_embeddings": 64})
    folder = make_family(tmp_path, "llama")
    decoding = {"max_new_tokens": 80, "trace": "tokens", "rule": "base", "temperature": 0}
    rows = [ask("long", "x" * 40), ask("short", "who?")]
    config = config_of(folder, decoding=decoding, cluster={"slots": 2})
    together = decode(config, rows)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompter = assemble(config, NOWHERE).prompter
    for row in rows:
        assert decode(config, [row])[row.row_id] == together[row.row_id]
        answer = [token.token_id for token in together[row.row_id].tokens]
        prompt = prompter.encode(row.messages, {})["base"]
        assert len(prompt) + len(answer) <= 64
        expected = generated_logprobs(model, prompt, answer).tolist()
        assert [token.base_logprob for token in together[row.row_id].tokens] == pytest.approx(expected, abs=2e-3)
    assert len(prompter.encode(rows[0].messages, {})["base"]) + len(together["long"].tokens) == 64


def test_with_longrope_a_long_row_changes_nothing_of_a_short_one_and_answers_cross_the_switch(tmp_path):
    folder = make_family(tmp_path, "phi3-longrope")  # which switches at 64 tokens
    decoding = {"max_new_tokens": 30, "trace": "tokens", "rule": "base", "temperature": 0}
    rows = [ask("long", "x" * 235), ask("short", "hi"), ask("crossing", "x" * 45)]
    config = config_of(folder, decoding=decoding, cluster={"slots": 3})
    together = decode(config, rows)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompter = assemble(config, NOWHERE).prompter
    runner = load_language_model(host_spec(folder)).runner
    for row in rows:
        assert decode(config, [row])[row.row_id] == together[row.row_id]
        answer = [token.token_id for token in together[row.row_id].tokens]
        prompt = prompter.encode(row.messages, {})["base"]
        expected = generated_logprobs(model, prompt, answer).tolist()
        assert [token.base_logprob for token in together[row.row_id].tokens] == pytest.approx(expected, abs=2e-3)
        # an existing answer is scored by the frequencies with which it would be decoded
        assert runner.score({"base": prompt}, answer)[0].tolist() == pytest.approx(expected, abs=2e-3)
        if row.row_id == "crossing":
            assert len(prompt) < 64 < len(prompt) + len(answer)
