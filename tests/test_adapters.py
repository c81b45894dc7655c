"""LoRA adapters that are mixed in one pass: every token gets what peft gives it alone."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import tiny_models
from support.language_models import ADAPTER_ROLES, ADAPTER_SKIPS, compile_layers, runner_of, spec_of
from support.language_models import logits_after as logits_of
from support.lora import make_lora
from transformers import AutoModelForCausalLM, OPTConfig

from pipeline.errors import ConfigurationError
from pipeline.worker import loading
from pipeline.worker.adapters import LowRank
from pipeline.worker.joined_projections import join_projections
from pipeline.worker.loading import load_language_model

LINEARS = {
    "llama": ("q_proj", "v_proj", "o_proj", "up_proj"),
    "qwen2": ("q_proj", "k_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "neox": ("query_key_value", "dense_h_to_4h"),
}
logits_after = partial(logits_of, skips=ADAPTER_SKIPS)
runner_with = partial(runner_of, roles=ADAPTER_ROLES)


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Two adapters of a tiny model: other modules, ranks and scalings."""

    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        targets = LINEARS[kind]
        return {
            "one": make_lora(folder / "one", tiny(kind), *targets, seed=1, lora_alpha=3),
            "two": make_lora(
                folder / "two", tiny(kind), *targets[1:], seed=2, r=6, rank_pattern={targets[1]: 3}, use_rslora=True,
                layers_to_transform=[1],
            ),
        }  # fmt: skip

    return make


@torch.inference_mode()
def plain_logprobs(folder, adapter, tokens):
    """Log-probabilities [V] after the tokens by peft alone."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("has_fixed_shapes", [False, True])
@pytest.mark.parametrize("kind", list(LINEARS))
def test_every_token_gets_what_its_adapter_gives_it_alone(tiny, two, kind, has_fixed_shapes):
    adapters = two(kind)
    runner = runner_with(tiny(kind), adapters=adapters, has_fixed_shapes=has_fixed_shapes)
    prompts = [[3, 9, 4], list(range(40)), [7] * 30]
    found = logits_after(runner, {0: 2, 1: 0, 2: 3}, prompts, num_steps=4)
    for row, prompt in enumerate(prompts):
        tokens = [*prompt, *((7 * row + step) % 256 for step in range(4))]
        for at, name in enumerate((None, "one", "two")):
            expected = plain_logprobs(tiny(kind), adapters.get(name), tokens)
            torch.testing.assert_close(found[row][at], expected, atol=1e-4, rtol=0)
    scores = runner.score({role.name: [3, 9, 4] for role in ADAPTER_ROLES}, [5, 6])
    for at, name in enumerate((None, "one", "two")):
        expected = [plain_logprobs(tiny(kind), adapters.get(name), [3, 9, 4, *[5][:n]])[5 + n] for n in (0, 1)]
        torch.testing.assert_close(scores[at], torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("has_fixed_shapes", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_a_row_with_adapters_are_the_same_to_the_bit_in_any_batch(tiny, two, kind, has_fixed_shapes):
    num_slots = 12
    generator = random.Random(1)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(3, 60))] for _ in range(num_slots)]
    runner = runner_with(tiny(kind), adapters=two(kind), num_slots=num_slots, has_fixed_shapes=has_fixed_shapes)
    together = logits_after(runner, {row: row for row in range(num_slots)}, prompts, num_steps=3)
    for batch in ([0], [3, 1], list(range(5)), list(range(7, 0, -1)), list(range(0, 12, 2))):
        places = dict(zip(batch, generator.sample(range(num_slots), len(batch)), strict=True))
        for row, logits in logits_after(runner, places, prompts, num_steps=3).items():
            assert torch.equal(logits, together[row])


@pytest.mark.parametrize("has_fixed_shapes", [False, True])
def test_an_adapter_of_one_rank_gives_the_same_bits_in_any_batch(tiny, tmp_path, has_fixed_shapes):
    folder = tiny("llama")
    adapters = {"one": make_lora(tmp_path / "one", folder, "q_proj", "v_proj", "o_proj", seed=1, r=1)}
    options = {"num_slots": 12, "has_fixed_shapes": has_fixed_shapes, "roles": ADAPTER_ROLES[:2]}
    runner = runner_with(folder, adapters=adapters, **options)
    prompts = [[row + at for at in range(3 + 2 * row)] for row in range(12)]
    together = logits_after(runner, {row: row for row in range(12)}, prompts, num_steps=3)
    for batch in ([0], [3, 1], list(range(5)), list(range(0, 12, 2))):
        for row, logits in logits_after(runner, {row: row for row in batch}, prompts, num_steps=3).items():
            assert torch.equal(logits, together[row])


def test_a_layer_that_sees_tokens_without_a_batch_gives_each_its_own_adapter(tiny, tmp_path):
    """As many tokens as, and more than, its inputs are wide: OPT flattens before a projection."""
    folder = tmp_path / "opt"
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=261, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    adapters = {
        "one": make_lora(tmp_path / "one", folder, "fc1", "q_proj", seed=1),
        "two": make_lora(tmp_path / "two", folder, "fc1", "fc2", seed=2),
    }
    runner = runner_with(folder, adapters=adapters)
    for length in (4, 5, 6, 8, 30):
        prompt = list(range(20, 20 + length))
        found = logits_after(runner, {0: 1}, [prompt], num_steps=1)
        for at, name in enumerate((None, "one", "two")):
            expected = plain_logprobs(folder, adapters.get(name), [*prompt, 0])
            torch.testing.assert_close(found[0][at], expected, atol=1e-3, rtol=0)


def test_an_adapter_that_changes_the_model_itself_is_refused(tiny, tmp_path):
    folder = tiny("qwen2")
    adapter = make_lora(tmp_path / "one", folder, "q_proj", bias="lora_only")
    with pytest.raises(ConfigurationError, match="has bias: lora_only, which"):
        spec_of(folder, adapters={"one": adapter})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "init_lora_weights": "pissa"}))
    with pytest.raises(ConfigurationError, match="has init_lora_weights: pissa, which"):
        spec_of(folder, adapters={"one": adapter})


def test_modules_that_an_adapter_brings_as_a_whole_are_its_own(tiny, tmp_path):
    folder = tiny("llama")
    adapters = {
        "one": make_lora(tmp_path / "one", folder, "q_proj", seed=1, modules_to_save=["lm_head", "embed_tokens"]),
        "two": make_lora(tmp_path / "two", folder, "q_proj", seed=2),
    }
    found = logits_after(runner_with(folder, adapters=adapters), {0: 1}, [[3, 9, 4]], num_steps=1)
    for at, name in enumerate((None, "one", "two")):
        expected = plain_logprobs(folder, adapters.get(name), [3, 9, 4, 0])
        torch.testing.assert_close(found[0][at], expected, atol=1e-4, rtol=0)


def test_an_adapter_of_embeddings_is_refused_with_what_to_do(tiny, tmp_path):
    folder = tiny("llama")
    adapters = {
        "one": make_lora(tmp_path / "one", folder, "embed_tokens"),
        "two": make_lora(tmp_path / "two", folder, "q_proj"),
    }
    message = r"(?s)for base.*an adapter changes .*embed_tokens by more than LoRA.*\(Embedding\).*merge_and_unload"
    with pytest.raises(ConfigurationError, match=message):
        load_language_model(spec_of(folder, roles=ADAPTER_ROLES, adapters=adapters))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_siblings_with_adapters_share_a_product_that_is_compiled_once_for_alike_layers(
    tiny, tmp_path, kind, monkeypatch
):
    """As on a GPU, but for the backend."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    adapters = {
        "one": make_lora(tmp_path / "one", tiny(kind), *LINEARS[kind], seed=1),
        "two": make_lora(tmp_path / "two", tiny(kind), *LINEARS[kind][1:], seed=2, r=6),
    }
    prompts, places = [[3, 9, 4], list(range(40)), [7] * 30], {0: 2, 1: 0, 2: 3}
    expected = logits_after(runner_with(tiny(kind), adapters=adapters), places, prompts, num_steps=2)
    runner = runner_with(tiny(kind), adapters=adapters, has_fixed_shapes=True)
    model = compile_layers(runner)
    assert join_projections(model) == 0  # they are joined
    torch._dynamo.utils.counters.clear()
    found = logits_after(runner, places, prompts, num_steps=2)
    for row in range(3):
        torch.testing.assert_close(found[row], expected[row], atol=1e-3, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of two layers and two shapes
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def loud(tiny, two, tmp_path_factory):
    """A model that magnifies roundings, as a strongly trained adapter does."""
    folder = tmp_path_factory.mktemp("loud") / "m"
    shutil.copytree(tiny(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def test_a_model_that_magnifies_roundings_is_decoded_in_slots(loud, two):
    spec = replace(spec_of(loud, roles=ADAPTER_ROLES, adapters=two("llama")), dtype="bfloat16")
    assert load_language_model(spec).why_plain is None


def test_an_adapter_that_is_off_is_noticed_in_half_precision(loud, two, monkeypatch):
    take = loading._take_adapters

    def take_too_much(wrapped, spec):
        adapters = take(wrapped, spec)
        with torch.no_grad():
            for module in wrapped.modules():
                if isinstance(module, LowRank):
                    module.gates.mul_(1.5)
        return adapters

    monkeypatch.setattr(loading, "_take_adapters", take_too_much)
    spec = replace(spec_of(loud, roles=ADAPTER_ROLES, adapters=two("llama")), dtype="bfloat16")
    assert "differ from a plain forward pass" in load_language_model(spec).why_plain
