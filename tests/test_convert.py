"""`cage convert`: pickled weights become safetensors, and nothing in a pickle runs."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from support.commands import cage
from support.decoding import NOWHERE, ask, config_of, decode
from support.heads import random
from support.lora import make_lora

from pipeline.errors import ConfigurationError
from pipeline.hub.pickles import _convert_one, convert_folder, read_tensors
from pipeline.runtime.assembly import assemble


def pickled(source, folder, parts):
    """A copy of a model's folder with its weights in pickled parts alone."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
        own = OrderedDict((name, weights[name]) for name in names[part::parts])
        weight_map |= dict.fromkeys(own, file)
        torch.save(own, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_a_converted_model_gives_the_answers_of_the_original(tiny, tmp_path):
    source = tiny("llama")
    folder = pickled(source, tmp_path / "model", 3)
    with pytest.raises(ConfigurationError, match=r"only as .*\.bin.*`cage convert FOLDER`"):
        assemble(config_of(folder), NOWHERE)
    done = list(convert_folder(folder))
    assert [each.target for each in done] == [f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3)]
    assert list(convert_folder(folder)) == []
    decoding = {"max_new_tokens": 6}
    original, converted = (
        decode(config_of(each, decoding=decoding), [ask("a", "hello")]) for each in (source, folder)
    )
    assert original == converted
    assert not list(folder.glob(".*.tmp"))


def test_tied_halves_and_integers_are_written_bit_by_bit(tmp_path):
    tied = torch.tensor([[1.0, float("nan")], [-0.0, 2.0]])
    stored = {
        "a": tied,
        "b": tied,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "view": torch.arange(12).view(3, 4).t(),
        "scalar": torch.tensor(7),
    }
    torch.save(stored, tmp_path / "pytorch_model.bin")
    done = _convert_one(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors")
    assert done["num_tensors"] == 5
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_an_adapter_and_its_value_head_are_converted_and_used(tiny, tmp_path):
    base = tiny("llama")
    adapter = make_lora(tmp_path / "adapter", base, "q_proj", seed=2)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    head = {"v_head.summary.weight": random(1, 64, seed=1), "v_head.summary.bias": torch.zeros(1)}
    torch.save(head, adapter / "value_head.bin")
    torch.save({"lr": 0.1}, adapter / "training_args.bin")
    result = cage("convert", str(adapter))
    assert result.returncode == 0
    assert result.stdout.splitlines()[0].startswith("adapter_model.bin -> adapter_model.safetensors: 4 tensors, ")
    assert result.stdout.splitlines()[1] == "value_head.bin -> value_head.safetensors: 2 tensors, 260 B"
    principals = {"worth": {"kind": "value", "model": str(base), "adapter": str(adapter), "candidates": 5}}
    record = decode(config_of(base, principals, decoding={"max_new_tokens": 4}), [ask("a", "hello")])["a"]
    assert record.rewards["worth"] != 0
    assert "safetensors already" in cage("convert", str(adapter)).stdout


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_nothing_of_a_pickle_runs_and_it_is_refused_in_one_line(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"weight": torch.ones(2)}, tmp_path / "adapter_model.bin")  # what comes before it is converted
    torch.save({"weight": torch.zeros(2), "evil": Evil(mark)}, tmp_path / "pytorch_model.bin")
    result = cage("convert", str(tmp_path))
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "pytorch_model.bin cannot be converted: it holds" in result.stderr
    assert "system, which is no tensor and could run code" in result.stderr
    assert not mark.exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["adapter_model.bin", "adapter_model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("wrap", [[], ["state_dict"], ["model"], ["module", "state_dict"]])
def test_weights_are_found_where_trainers_put_them(tmp_path, wrap):
    stored = {"weight": torch.ones(2)}
    for key in wrap:
        stored = {key: stored}
    torch.save(stored, tmp_path / "pytorch_model.bin")
    assert list(read_tensors(tmp_path / "pytorch_model.bin")) == ["weight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is no file of tensors"),
        (b"hello world", "it is no file of tensors"),
        ({}, "it holds no weights by name"),
        ([torch.zeros(1)], "it holds no weights by name"),
        ({"a": torch.zeros(1), "step": 3}, "it holds 1 entries that are no tensors, such as step"),
    ],
)
def test_files_of_other_things_are_refused(tmp_path, content, message):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)


def test_a_folder_without_pickled_weights_is_refused_with_what_it_has(tmp_path):
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ConfigurationError, match=r"no pickled weights.*weights.pt have other names"):
        list(convert_folder(tmp_path))
    with pytest.raises(ConfigurationError, match="there is no folder"):
        list(convert_folder(tmp_path / "missing"))
