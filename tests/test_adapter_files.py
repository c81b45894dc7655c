"""An adapter is used whole or refused; whatever it brings is its own and never the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.language_models import logits_after as logits_of
from support.language_models import runner_of, spec_of
from support.lora import make_lora
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.errors import ConfigurationError
from pipeline.protocol.topology import HostRole
from pipeline.worker.adapters import without_peft_warnings
from pipeline.worker.loading import load_language_model

ROLES = (HostRole("a"), HostRole("b", "one"))
PROMPT = [3, 9, 4, 100, 7]
logits_after = partial(logits_of, skips={"a": 0, "b": 0}, num_steps=1)
runner_with = partial(runner_of, roles=ROLES)


def make_tied(folder: Path) -> Path:
    """A model whose head is its embedding."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=261, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=0,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


@torch.inference_mode()
def plain_logprobs(folder: Path, adapter: Path | None) -> Tensor:
    """Log-probabilities [V] after the prompt and a token by transformers and peft alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        with without_peft_warnings():
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return model(torch.tensor([[*PROMPT, 0]])).logits[0, -1].log_softmax(-1)


def write(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **settings: Any) -> Path:
    """Change an adapter's weights and its configuration."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return adapter


def drop(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


SERVED: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*\.(0|1)\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "some layers of a pattern": {
        "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers",
    },
    "without some": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "ranks and scalings of their own": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1.*v_proj": 7},
        "alpha_pattern": {"v_proj": 16},
    },
    "rank-stabilised": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 8, "lora_alpha": 4},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "a norm": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
}  # fmt: skip


@pytest.mark.parametrize("case", list(SERVED))
def test_an_adapter_of_any_targets_gives_what_peft_gives_and_leaves_the_base_alone(tiny, tmp_path, case):
    adapter = make_lora(tmp_path / "one", tiny(), **SERVED[case])
    runner = runner_with(tiny(), adapters={"one": adapter})
    found = logits_after(runner, {0: 1}, [PROMPT])[0]
    alone = logits_of(runner_of(tiny(), roles=ROLES[:1]), {0: 1}, [PROMPT], skips={"a": 0}, num_steps=1)[0]
    assert torch.equal(found[0], alone[0])
    torch.testing.assert_close(found[0], plain_logprobs(tiny(), None), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], plain_logprobs(tiny(), adapter), atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_tied_model_keeps_its_head_and_embedding_beside_an_adapter_with_its_own(tmp_path, modules):
    folder = make_tied(tmp_path / "base")
    with without_peft_warnings():
        adapter = make_lora(tmp_path / "one", folder, "q_proj", modules_to_save=modules)
    found = logits_after(runner_with(folder, adapters={"one": adapter}), {0: 1}, [PROMPT])[0]
    torch.testing.assert_close(found[0], plain_logprobs(folder, None), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], plain_logprobs(folder, adapter), atol=1e-4, rtol=0)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Any], str]] = {
    "names that match nothing": (
        lambda weights: {name.replace("layers", "blocks"): weight for name, weight in weights.items()}, {},
        r"its file lacks 8 weights \(base_model.model.model.layers.0.self_attn.q_proj.lora_A.*and 3 more\); "
        r"nothing in the model matches 8 weights \(base_model.model.model.blocks.0.*and 3 more\)",
    ),
    "a prefix": (
        lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()}, {},
        r"its file lacks 8 weights.*nothing in the model matches 8 weights \(_orig_mod.base_model",
    ),
    "no lora_A": (drop("lora_A"), {}, r"its file lacks 4 weights \(.*0.self_attn.q_proj.lora_A.weight"),
    "no lora_B": (drop("lora_B"), {}, r"its file lacks 4 weights \(.*0.self_attn.q_proj.lora_B.weight"),
    "one layer left out": (drop("layers.1"), {}, r"its file lacks 4 weights \(.*layers.1.self_attn.q_proj.lora_A"),
    "one target left out": (drop("v_proj"), {}, r"its file lacks 4 weights \(.*layers.0.self_attn.v_proj.lora_A"),
    "a target more in its configuration": (
        dict, {"target_modules": ["q_proj", "v_proj", "up_proj"]}, r"its file lacks 4 weights \(.*mlp.up_proj.lora_A"
    ),
    "a target less in its configuration": (
        dict, {"target_modules": ["q_proj"]}, r"nothing in the model matches 4 weights \(.*v_proj.lora_A"
    ),
    "other layers in its configuration": (
        dict, {"layers_to_transform": [1]}, r"nothing in the model matches 4 weights \(.*layers.0.self_attn.q_proj"
    ),
    "a rank of another size": (dict, {"r": 5}, r"another shape than in the model: 8 weights|size mismatch"),
    "nothing": (lambda weights: {}, {}, r"its file holds no weights"),
    "a whole module without its weight": (
        dict, {"modules_to_save": ["lm_head"]}, r"its file lacks 1 weight \(base_model.model.lm_head.weight\)"
    ),
    "targets that are not there": (dict, {"target_modules": ["query_key_value"]}, r"query_key_value"),
    "a regular expression that matches nothing": (dict, {"target_modules": r".*\.attn\.q"}, r"\.\*"),
}  # fmt: skip


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_an_adapter_that_would_be_used_in_part_is_refused_with_names_and_counts(tiny, tmp_path, fault, is_second):
    change, settings, message = FAULTS[fault]
    adapter = write(make_lora(tmp_path / "bad", tiny(), "q_proj", "v_proj"), change, **settings)
    adapters = {"one": adapter}
    if is_second:
        adapters = {"good": make_lora(tmp_path / "good", tiny(), "q_proj", "v_proj"), **adapters}
    roles = (ROLES[0], *(HostRole(name, name) for name in adapters))
    with pytest.raises(ConfigurationError, match=rf"(?s)^model {tiny()} \(for base\): .*{message}") as caught:
        load_language_model(spec_of(tiny(), roles=roles, adapters=adapters))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_size_of_another_model_is_refused(tiny, tmp_path):
    adapter = make_lora(tmp_path / "one", tiny("gpt2"), "c_attn")
    with pytest.raises(ConfigurationError, match=r"(?s)for base.*c_attn"):
        load_language_model(spec_of(tiny(), roles=ROLES, adapters={"one": adapter}))
    adapter = write(
        make_lora(tmp_path / "two", tiny(), "q_proj"),
        lambda weights: {name: torch.cat([weight, weight]).contiguous() for name, weight in weights.items()},
    )
    with pytest.raises(ConfigurationError, match=r"(?s)for base.*(another shape|size mismatch)"):
        load_language_model(spec_of(tiny(), roles=ROLES, adapters={"one": adapter}))


MORE = {
    "DoRA": {"use_dora": True},
    "a bias": {"bias": "lora_only"},
    "biases of LoRA": {"lora_bias": True},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("case", list(MORE))
def test_an_adapter_that_is_more_than_lora_is_refused_with_what_to_do(tiny, tmp_path, case):
    folder = tiny("qwen2")  # with biases
    with without_peft_warnings():
        adapter = make_lora(tmp_path / "one", folder, **{"target_modules": ["q_proj"], **MORE[case]})
    with pytest.raises(ConfigurationError, match=r"(?s)merge.*merge_and_unload"):
        load_language_model(spec_of(folder, roles=ROLES, adapters={"one": adapter}))


def test_settings_that_the_installed_peft_does_not_know_are_refused(tiny, tmp_path):
    """peft leaves them out with a warning; a newer one would compute something else with the same weights."""
    adapter = make_lora(tmp_path / "one", tiny(), "q_proj")
    write(adapter, dict, use_later_scaling=True, later_config=None, merge_weights=False)
    with pytest.raises(ConfigurationError, match=r"has use_later_scaling: True, which peft \S+ does not know"):
        load_language_model(spec_of(tiny(), roles=ROLES, adapters={"one": adapter}))
    write(adapter, dict, use_later_scaling=False)
    load_language_model(spec_of(tiny(), roles=ROLES, adapters={"one": adapter}))


def with_saved_embeddings(adapter: Path, base: Path, change: Callable[[Tensor], Tensor], *, head: bool) -> Path:
    """As peft writes an adapter with save_embedding_layers."""
    weights = load_file(base / "model.safetensors")
    own = {"base_model.model.model.embed_tokens.weight": change(weights["model.embed_tokens.weight"])}
    if head:
        own["base_model.model.lm_head.weight"] = change(weights["lm_head.weight"])
    return write(adapter, lambda adapter_weights: {**adapter_weights, **own})


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_embeddings_saved_with_an_adapter_change_nothing_where_they_are_the_bases(tiny, tmp_path, is_tied, is_first):
    folder = make_tied(tmp_path / "base") if is_tied else tiny()
    adapter = make_lora(tmp_path / "one", folder, "q_proj")
    expected = plain_logprobs(folder, adapter)
    with_saved_embeddings(adapter, folder, torch.clone, head=not is_tied)
    adapters = {"one": adapter, "two": make_lora(tmp_path / "two", folder, "q_proj", seed=3)}
    if not is_first:
        adapters = dict(reversed(adapters.items()))
    found = logits_after(runner_with(folder, adapters=adapters), {0: 1}, [PROMPT])[0]
    torch.testing.assert_close(found[0], plain_logprobs(folder, None), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_saved_with_an_adapter_that_are_others_are_refused_for_what_they_are(tiny, tmp_path, is_tied):
    folder = make_tied(tmp_path / "base") if is_tied else tiny()
    message = (
        r"brings 1 weight \(model.embed_tokens.weight\) of the model itself.*save_embedding_layers.*merge_and_unload"
    )
    for name, change in {
        "scaled": lambda weight: 1.5 * weight,
        "longer": lambda weight: torch.cat([weight] * 2),
    }.items():
        adapter = make_lora(tmp_path / name, folder, "q_proj")
        with_saved_embeddings(adapter, folder, change, head=False)
        with pytest.raises(ConfigurationError, match=message):
            load_language_model(spec_of(folder, roles=ROLES, adapters={"one": adapter}))


def test_a_folder_with_the_model_beside_the_adapter_is_an_adapter(tiny, tmp_path):
    folder = make_lora(tmp_path / "one", tiny(), "q_proj")
    shutil.copy(tiny() / "config.json", folder)
    found = logits_after(runner_with(tiny(), adapters={"one": folder}), {0: 1}, [PROMPT])[0]
    torch.testing.assert_close(found[1], plain_logprobs(tiny(), folder), atol=1e-4, rtol=0)
