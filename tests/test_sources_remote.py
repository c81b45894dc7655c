"""Models in object stores: headers first, weights once, each file whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support import storage
from support.model_sources import make_adapter

from pipeline.errors import ConfigurationError
from pipeline.hub.descriptions import describe_model
from pipeline.hub.remote import fetch, list_remote
from pipeline.hub.sources import Location, fetch_weights, resolve_adapter, resolve_model
from pipeline.hub.tokenizer_facts import load_tokenizer

Tiny = Callable[..., Path]


@pytest.fixture
def address(tiny: Tiny) -> Iterator[str]:
    """A model in a store of this process's memory, beside what a training leaves behind."""
    store = fsspec.filesystem("memory")
    store.put(f"{tiny('llama')}/", "/bucket/models/tiny/", recursive=True)
    store.pipe("/bucket/models/tiny/optimizer.pt", b"x" * 1000)
    store.pipe("/bucket/models/tiny/checkpoint-1/config.json", b"{}")
    yield "memory://bucket/models/tiny"
    store.rm("/bucket", recursive=True)


def test_a_remote_model_is_described_before_its_weights_are_fetched(address: str, tiny: Tiny, tmp_path: Path) -> None:
    source = resolve_model(address, cache_folder=tmp_path)
    here = resolve_model(str(tiny("llama")), cache_folder=tmp_path)
    assert source.location is Location.REMOTE
    assert source.identity == here.identity
    assert describe_model(source) == describe_model(here)
    assert load_tokenizer(source).get_vocab() == load_tokenizer(here).get_vocab()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_are_fetched_once_and_nothing_else_is(address: str, tiny: Tiny, tmp_path: Path) -> None:
    source = resolve_model(address, cache_folder=tmp_path)
    lines: list[str] = []
    folder = fetch_weights(source, cache_folder=tmp_path, progress=lines.append)
    assert [line.split(" (")[0] for line in lines] == [f"{address}: fetching model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == (tiny("llama") / "model.safetensors").read_bytes()
    assert not any(path.suffix in (".pt", ".partial") or path.is_dir() for path in folder.iterdir())
    again = fetch_weights(source, cache_folder=tmp_path, progress=lines.append)
    assert again == folder
    assert len(lines) == 1


def test_a_machine_without_the_plans_cache_fetches_for_itself(address: str, tmp_path: Path) -> None:
    source = resolve_model(address, cache_folder=tmp_path / "head")
    folder = fetch_weights(source, cache_folder=tmp_path / "worker")
    assert folder.is_relative_to(tmp_path / "worker")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}


def test_processes_that_fetch_together_all_get_the_whole(address: str, tiny: Tiny, tmp_path: Path) -> None:
    source = resolve_model(address, cache_folder=tmp_path)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch_weights(source, cache_folder=tmp_path), range(4)))
    assert len(folders) == 1
    whole = (tiny("llama") / "model.safetensors").read_bytes()
    assert (folders.pop() / "model.safetensors").read_bytes() == whole


def test_a_model_that_changed_after_the_plan_is_refused(address: str, tiny: Tiny, tmp_path: Path) -> None:
    source = resolve_model(address, cache_folder=tmp_path)
    other = tiny("llama", seed=1) / "model.safetensors"
    fsspec.filesystem("memory").pipe("/bucket/models/tiny/model.safetensors", other.read_bytes())
    with pytest.raises(ConfigurationError, match="is not what was planned with"):
        fetch_weights(source, cache_folder=tmp_path)


class BreakingStore:
    """A store whose connection breaks in the middle of every file."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def get_file(self, path: str, target: str) -> None:
        Path(target).write_bytes(self.store.cat_file(path)[:1000])
        raise ConnectionResetError("connection reset by peer")


def test_a_broken_fetch_leaves_no_half_file(address: str, tmp_path: Path) -> None:
    tree = list_remote(address)
    broken = replace(tree, store=BreakingStore(tree.store))
    with pytest.raises(ConfigurationError, match=r"model\.safetensors cannot be fetched: ConnectionResetError"):
        fetch(broken, ["model.safetensors"], tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())
    fetch(tree, ["model.safetensors"], tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == tree.sizes["model.safetensors"]


def test_a_model_that_does_not_fit_is_refused_before_it_is_fetched(address: str, tmp_path: Path) -> None:
    tree = list_remote(address)
    huge = replace(tree, sizes={**tree.sizes, "model.safetensors": 10**18})
    with pytest.raises(ConfigurationError, match="CAGE_CACHE names another place"):
        fetch(huge, ["model.safetensors"], tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory://bucket/none", "memory://bucket/none holds no files"),
        ("nostore://bucket/model", "nostore://bucket/model cannot be listed"),
    ],
)
def test_what_is_not_there_is_reported(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve_model(name, cache_folder=tmp_path)


def test_pickled_weights_are_never_fetched(address: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.mv("/bucket/models/tiny/model.safetensors", "/bucket/models/tiny/pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="can run code"):
        resolve_model(address, cache_folder=tmp_path)
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.slow
def test_models_and_adapters_come_from_s3(tiny: Tiny, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    with storage.s3_server():
        store = fsspec.filesystem("s3")
        store.mkdir("models")
        store.put(f"{tiny('gpt2')}/", "models/gpt2/", recursive=True)
        store.put(f"{adapter}/", "models/adapter/", recursive=True)
        here = resolve_model(str(tiny("gpt2")), cache_folder=tmp_path)
        source = resolve_model("s3://models/gpt2/", cache_folder=tmp_path / "cache")
        assert source.identity == here.identity
        folder = fetch_weights(source, cache_folder=tmp_path / "cache")
        assert (folder / "model.safetensors").read_bytes() == (tiny("gpt2") / "model.safetensors").read_bytes()
        found = resolve_adapter("s3://models/adapter", cache_folder=tmp_path / "cache")
        assert found.identity == resolve_adapter(str(adapter), cache_folder=tmp_path).identity
        with pytest.raises(ConfigurationError, match="holds no files"):
            resolve_model("s3://models/none", cache_folder=tmp_path / "cache")
        with pytest.raises(ConfigurationError, match="no-such-bucket"):
            resolve_model("s3://no-such-bucket/model", cache_folder=tmp_path / "cache")
