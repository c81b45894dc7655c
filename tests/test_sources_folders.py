"""Models in folders: found, refused with reasons, fingerprinted by their content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.model_sources import make_adapter

from pipeline.errors import ConfigurationError
from pipeline.hub.sources import AdapterSource, Location, fetch_weights, resolve_adapter, resolve_model
from pipeline.hub.weight_files import LocalTree, Span, find_model_files, take_inventory

Tiny = Callable[..., Path]


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def refusal(name: str | Path, cache: Path, **options: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        resolve_model(str(name), cache_folder=cache, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def identity(folder: Path, cache: Path) -> str:
    return resolve_model(str(folder), cache_folder=cache).identity


def test_a_folder_is_its_own_source(model: Path, tmp_path: Path) -> None:
    source = resolve_model(str(model), cache_folder=tmp_path)
    assert (source.location, source.path, source.revision) == (Location.FOLDER, str(model), None)
    assert fetch_weights(source, cache_folder=tmp_path) == model


def test_a_folder_may_be_relative(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model", cache_folder=tmp_path).path == str(model)
    assert resolve_model("./model/", cache_folder=tmp_path).path == str(model)


def test_identity_belongs_to_the_content_not_the_place(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    (copy / "README.md").write_text("notes")
    (copy / "training_args.bin").write_bytes(b"not read by anyone")
    assert identity(copy, tmp_path) == identity(model, tmp_path)


def test_identity_tells_a_model_tuned_in_one_tensor(model: Path, tmp_path: Path) -> None:
    before = identity(model, tmp_path)
    tensors = load_file(model / "model.safetensors")
    seen = {before}
    for name in tensors:
        changed = {**tensors, name: tensors[name] + 1e-3}
        save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
        seen.add(identity(model, tmp_path))
    assert len(seen) == len(tensors) + 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_identity_covers_configuration_and_tokenizer(name: str, model: Path, tmp_path: Path) -> None:
    before = identity(model, tmp_path)
    (model / name).write_text((model / name).read_text() + " ")
    assert identity(model, tmp_path) != before


def test_python_files_count_only_where_they_are_trusted(model: Path, tmp_path: Path) -> None:
    before = identity(model, tmp_path)
    (model / "modeling.py").write_text("print()")
    assert identity(model, tmp_path) == before
    assert resolve_model(str(model), cache_folder=tmp_path, trust_remote_code=True).identity != before


@dataclass
class CountingTree:
    tree: LocalTree
    num_bytes: int = 0
    address: str = "counted"
    sizes: dict[str, int] = field(default_factory=dict)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        blocks = self.tree.read(spans)
        self.num_bytes += sum(map(len, blocks))
        return blocks


def test_a_fingerprint_of_forty_gigabytes_reads_less_than_one_megabyte(model: Path) -> None:
    shape, num_bytes = [65_536, 4_096], 65_536 * 4_096 * 2
    tensors = {
        f"layers.{i}": {"dtype": "BF16", "shape": shape, "data_offsets": [i * num_bytes, (i + 1) * num_bytes]}
        for i in range(80)
    }
    header = json.dumps(tensors).encode()
    with (model / "model.safetensors").open("wb") as sparse:
        sparse.write(len(header).to_bytes(8, "little") + header)
        sparse.truncate(8 + len(header) + 80 * num_bytes)
    tree = CountingTree(LocalTree(model), sizes=LocalTree(model).sizes)
    inventory = take_inventory(tree, find_model_files(tree))
    assert inventory.num_parameters_by_dtype == {"BF16": 80 * 65_536 * 4_096}
    assert sum(tree.sizes.values()) > 40e9
    assert tree.num_bytes < 1e6


def test_weights_in_parts_are_one_model(model: Path, tmp_path: Path) -> None:
    whole = resolve_model(str(model), cache_folder=tmp_path)
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, model / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    source = resolve_model(str(model), cache_folder=tmp_path)
    assert source.num_parameters_by_dtype == whole.num_parameters_by_dtype

    (model / "b.safetensors").unlink()
    assert "lacks weights that its model.safetensors.index.json names: b.safetensors" in refusal(model, tmp_path)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    assert "has no usable weight_map" in refusal(model, tmp_path)


def test_a_folder_without_a_configuration_says_what_it_holds(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    message = refusal(model, tmp_path)
    assert "has no config.json" in message
    assert "It holds " in message
    assert "tokenizer.json" in message


def test_pickled_weights_are_refused_for_what_they_are(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refusal(model, tmp_path)
    assert "pytorch_model.bin" in message
    assert "can run code" in message


def test_a_folder_without_weights_says_which_it_wants(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "has no weights (model.safetensors or model.safetensors.index.json)" in refusal(model, tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, 20_000])
def test_a_cut_off_weight_file_is_found_before_loading(num_bytes: int, model: Path, tmp_path: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(num_bytes)
    assert f"model.safetensors is not a whole safetensors file ({num_bytes} bytes)" in refusal(model, tmp_path)


def test_a_broken_index_is_named(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is not valid JSON" in refusal(model, tmp_path)


def test_a_missing_folder_suggests_its_neighbour(model: Path, tmp_path: Path) -> None:
    assert f"did you mean {model}?" in refusal(tmp_path / "modle", tmp_path)
    assert "no model folder" in refusal("./nowhere/at/all", tmp_path)


def test_a_file_is_no_model(model: Path, tmp_path: Path) -> None:
    assert "a model is a folder" in refusal(model / "model.safetensors", tmp_path)


def test_a_slip_in_the_embedded_name_is_told(tmp_path: Path) -> None:
    assert "the embedded one is called smollm2-135m" in refusal("smolLM2-135M", tmp_path)


def test_a_folder_has_no_revisions(model: Path, tmp_path: Path) -> None:
    assert "is not a hub id" in refusal(model, tmp_path, revision="main")


def test_a_changed_folder_is_not_the_planned_model(model: Path, tmp_path: Path) -> None:
    source = resolve_model(str(model), cache_folder=tmp_path)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    with pytest.raises(ConfigurationError, match="is not what was planned with"):
        fetch_weights(source, cache_folder=tmp_path)
    shutil.rmtree(model)
    with pytest.raises(ConfigurationError, match="must be on every machine"):
        fetch_weights(source, cache_folder=tmp_path)


def test_an_adapter_tells_its_rank_and_backbone(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter")
    source = resolve_adapter(str(folder), cache_folder=tmp_path)
    assert (source.rank, source.backbone) == (4, "org/backbone")
    assert source.num_parameters_by_dtype == {"F32": 64}
    assert fetch_weights(source, cache_folder=tmp_path) == folder
    other = resolve_adapter(str(make_adapter(tmp_path / "other", scale=2.0)), cache_folder=tmp_path)
    assert other.identity != source.identity
    assert isinstance(other, AdapterSource)


@pytest.mark.parametrize("rank", [None, 0, "8", True])
def test_a_rank_that_is_no_number_is_refused(tmp_path: Path, rank: object) -> None:
    file = make_adapter(tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": rank}))
    with pytest.raises(ConfigurationError, match=f"r in adapter_config.json must be a positive number; got {rank!r}"):
        resolve_adapter(str(file.parent), cache_folder=tmp_path)


def test_models_and_adapters_are_not_taken_for_each_other(model: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter")
    assert "name it under adapter" in refusal(folder, tmp_path)
    with pytest.raises(ConfigurationError, match=r"no adapter_config\.json"):
        resolve_adapter(str(model), cache_folder=tmp_path)
    with pytest.raises(ConfigurationError, match="is a model, not an adapter"):
        resolve_adapter("smollm2-135m", cache_folder=tmp_path)


def test_an_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", peft_type="PREFIX_TUNING")
    with pytest.raises(ConfigurationError, match="peft_type PREFIX_TUNING"):
        resolve_adapter(str(folder), cache_folder=tmp_path)


def test_an_adapter_that_is_more_than_lora_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", use_dora=True, lora_bias=False, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ConfigurationError, match=r"has use_dora, layer_replication, which.*merge_and_unload"):
        resolve_adapter(str(folder), cache_folder=tmp_path)


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match="can run code"):
        resolve_adapter(str(folder), cache_folder=tmp_path)
