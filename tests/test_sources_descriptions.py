"""The sizes of a model, described before it is loaded, compared with the loaded model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pipeline.errors import ConfigurationError
from pipeline.hub.descriptions import describe_model
from pipeline.hub.sources import ModelSource, resolve_model

Tiny = Callable[..., Path]
KINDS = ["llama", "gpt2", "qwen2", "qwen3", "neox"]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def source_of(folder: Path) -> ModelSource:
    return resolve_model(str(folder), cache_folder=folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_weights_take_what_was_described(kind: str, dtype: str, tiny: Tiny) -> None:
    described = describe_model(source_of(tiny(kind)))
    model = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=TORCH_DTYPES[dtype])
    parameters = list(model.parameters())  # tied weights once
    assert described.num_parameters == sum(each.numel() for each in parameters)
    assert described.weight_bytes(dtype) == sum(each.nbytes for each in parameters)
    assert described.architecture == type(model).__name__


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_takes_what_was_described(kind: str, tiny: Tiny) -> None:
    described = describe_model(source_of(tiny(kind)))
    model = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32)
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), past_key_values=cache)
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert described.kv_bytes_per_token("float32") * 5 == num_bytes
    assert (described.num_layers, described.head_dim, described.context_length) == (2, 16, 512)
    assert described.vocab_size == model.get_output_embeddings().out_features


def test_quantised_tensors_keep_their_stored_size(tiny: Tiny) -> None:
    stored = {"F8_E4M3": 1_000, "BF16": 100, "F4": 10}
    described = describe_model(replace(source_of(tiny("llama")), num_parameters_by_dtype=stored))
    assert described.stored_bytes == 1_000 + 200 + 5
    assert described.weight_bytes("float32") == 1_000 + 400 + 5


def test_a_model_without_attention_is_described_to_be_none_of_ours(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ConfigurationError, match="a decoder-only transformer is needed"):
        describe_model(source_of(folder))


@pytest.mark.parametrize("config", [{"model_type": "no-such-architecture"}, {}])
def test_an_unknown_architecture_is_one_line(config: dict[str, str], tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"the configuration of .* cannot be read") as caught:
        describe_model(source_of(folder))
    assert "\n" not in str(caught.value)


def test_code_of_a_model_is_not_run_unless_it_is_trusted(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (folder / "code.py").write_text("raise SystemExit('it ran')\n")
    auto_map = {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Tokenizer", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(ConfigurationError, match="set trust_remote_code: true if you trust that code"):
        describe_model(source_of(folder))


@pytest.mark.slow
def test_the_embedded_model_is_described(cache_folder: Path) -> None:
    described = describe_model(resolve_model("smollm2-135m", cache_folder=cache_folder))
    assert (described.num_parameters, described.vocab_size, described.context_length) == (134_515_008, 49_152, 8_192)
    assert described.kv_bytes_per_token("float32") == 2 * 30 * 3 * 64 * 4
