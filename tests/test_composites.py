"""Checkpoints that see or hear: their text is served from all of its weights, and the rest is left out."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import cage
from support.families import make_family
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from jobs.families.configurations import FAMILIES
from jobs.families.measure import host_spec
from pipeline.errors import ConfigurationError
from pipeline.hub.families import expect, read_table
from pipeline.worker.loading import load_language_model
from pipeline.worker.weights import load_causal_lm, towers_of

# with a class for the text alone, with one for the whole alone, and with other names in files than in the model
NAMES = ["qwen3_5", "llama4", "gemma3", "llava", "qwen2_vl", "mistral3"]


@pytest.fixture(autouse=True)
def _quiet():
    """Configurations this small make transformers warn of sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_type_that_reads_images_and_writes_text_is_in_the_table():
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(FAMILIES)
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(read_table().families)


def change(folder, edit):
    """Edit the weights of a folder in place."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder):
    return load_causal_lm(host_spec(folder), dtype=torch.float32)


def text_name(weights):
    """The name of a weight of the text's first layer."""
    return min(name for name in weights if ".layers.0." in name and not re.search("vis|tower", name))


def tower_name(weights):
    return min(name for name in weights if re.search("visual|vision_(tower|model)", name))


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_text_are_neither_missing_nor_left_over_and_towers_may_be(name, tmp_path):
    folder = make_family(tmp_path, name)
    whole = load_file(folder / "model.safetensors")
    load(folder)

    change(folder, lambda weights: weights.pop(tower_name(weights)))
    model = load(folder)
    assert all(tensor.numel() == 0 for tower in towers_of(model).values() for tensor in tower.parameters())
    change(folder, lambda weights: weights.update({f"{tower_name(weights)}.more": torch.ones(2)}))
    load(folder)

    change(folder, lambda weights: weights.pop(text_name(weights)))
    with pytest.raises(ConfigurationError, match=r"its files lack 1 weight \(\S*layers\.0\."):
        load(folder)
    more = text_name(whole).replace(".layers.0.", ".layers.7.")
    save_file({**whole, more: torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigurationError, match=r"its files hold 1 weight \(\S*layers\.7\.\S*\), which the model has"
    ):
        load(folder)


def test_a_type_that_reads_no_text_alone_is_refused_from_its_configuration():
    for name in ("blip", "florence2", "pi0", "kosmos-2"):
        found = expect({"model_type": name})
        assert found.decoding == "refused"
        assert found.reason


def test_the_plan_says_what_is_left_out(tmp_path):
    folder = make_family(tmp_path / "model", "llava")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": "a", "prompt": "hi"}) + "\n")
    config = tmp_path / "job.yaml"
    config.write_text(
        f"input: {{path: {tmp_path}/prompts.jsonl, prompt: prompt, id: id}}\noutput: {{path: {tmp_path}/out}}\n"
        f"base: {{model: {folder}}}\ndecoding: {{rule: base}}\nprincipals: {{}}\n"
    )
    result = cage("plan", "-c", str(config))
    assert result.returncode == 0, result.stderr
    assert "base reads and writes text alone: vision_config of its model is left out" in " ".join(
        result.stdout.split()
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_unless_they_are_left_out(number, tmp_path):
    folder = make_family(tmp_path, "llava")

    def spoil(name_in):
        def edit(weights):
            weights[name_in(weights)].view(-1)[1] = number

        return edit

    change(folder, spoil(tower_name))
    load_language_model(host_spec(folder))
    change(folder, spoil(text_name))
    with pytest.raises(ConfigurationError, match=r"1 weight \(\S*layers\.0\.\S*\) with numbers that are NaN or inf"):
        load_language_model(host_spec(folder))
