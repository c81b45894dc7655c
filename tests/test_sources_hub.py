"""Models of the hub: a fixed commit, small files first, an offline cache. Its client runs in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.model_sources import COMMIT, hub_server, make_adapter

from pipeline.errors import ConfigurationError
from pipeline.hub.sources import resolve_model

Tiny = Callable[..., Path]

PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from pipeline.errors import ConfigurationError
from pipeline.hub.sources import fetch_weights, resolve_adapter, resolve_model

def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())

def answer(kind="model", name="", revision=None, fetch=False):
    resolve = resolve_adapter if kind == "adapter" else resolve_model
    try:
        source = resolve(name, revision=revision, cache_folder=Path("unused"))
        files = names_in(source.path)
        fetched = names_in(fetch_weights(source, cache_folder=Path("unused"))) if fetch else []
        return {**dataclasses.asdict(source), "files": files, "fetched": fetched}
    except ConfigurationError as error:
        return {"error": str(error)}

print(json.dumps([answer(**question) for question in json.loads(sys.argv[1])], default=str))
"""


class Hub:
    def __init__(self, endpoint: str, asked: list[str], home: Path) -> None:
        self.asked, self.home = asked, home
        self.environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def ask(self, *questions: dict[str, Any], offline: bool = False) -> list[dict[str, Any]]:
        """Resolve in a process that knows this hub, as its address is read on import."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(questions)],
            env={**self.environ, "HF_HUB_OFFLINE": str(int(offline))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path) -> Iterator[Hub]:
    pickled = Path(shutil.copytree(tiny("llama"), tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    models = {
        "org/tiny": tiny("llama"),
        "org/pickled": pickled,
        "org/adapter": make_adapter(tmp_path / "adapter"),
    }
    with hub_server(models) as (endpoint, asked):
        yield Hub(endpoint, asked, tmp_path / "home")


@pytest.mark.slow
def test_a_hub_model_is_known_by_its_commit_before_its_weights_come(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    here = resolve_model(str(tiny("llama")), cache_folder=tmp_path)
    seen, whole = hub.ask({"name": "org/tiny"}, {"name": "org/tiny", "fetch": True})
    assert seen["revision"] == COMMIT
    assert seen["identity"] == f"hub:org/tiny@{COMMIT}"
    assert seen["num_parameters_by_dtype"] == here.num_parameters_by_dtype
    assert "config.json" in seen["files"]
    assert "model.safetensors" not in seen["files"]
    assert "model.safetensors" in whole["fetched"]

    num_asked = len(hub.asked)
    [offline] = hub.ask({"name": "org/tiny", "fetch": True}, offline=True)
    assert offline["identity"] == seen["identity"]
    assert offline["num_parameters_by_dtype"] == seen["num_parameters_by_dtype"]
    assert len(hub.asked) == num_asked


@pytest.mark.slow
def test_what_the_hub_lacks_is_told(hub: Hub) -> None:
    pickled, missing, revision, adapter = hub.ask(
        {"name": "org/pickled"},
        {"name": "org/none"},
        {"name": "org/tiny", "revision": "v9"},
        {"name": "org/adapter"},
    )
    assert "no safetensors weights" in pickled["error"]
    assert "run `cage convert FOLDER` and name that folder" in pickled["error"]
    assert "org/none is neither a folder here" in missing["error"]
    assert "has no revision v9" in revision["error"]
    assert "is it an adapter?" in adapter["error"]
    assert "pytorch_model.bin" not in hub.asked


@pytest.mark.slow
def test_an_adapter_comes_from_the_hub(hub: Hub) -> None:
    [answer] = hub.ask({"kind": "adapter", "name": "org/adapter", "fetch": True})
    assert (answer["rank"], answer["identity"]) == (4, f"hub:org/adapter@{COMMIT}")
    assert answer["fetched"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_offline_both_possibilities_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        resolve_model("org/never-seen", cache_folder=tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "org" / "never-seen") in message
    assert "hub model" in message
    assert "Without a network, give a local folder" in message
