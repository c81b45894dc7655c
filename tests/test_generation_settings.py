"""What generation_config.json says: ends are obeyed, and what is not obeyed is named in the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import cage
from transformers import GenerationConfig

from pipeline import Aligner
from pipeline.errors import ConfigurationError
from pipeline.hub.generation_settings import DRAWING, OTHER, unobeyed_settings
from pipeline.hub.sources import resolve_model

Tiny = Callable[..., Path]


def stating(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a model with other settings in its generation_config.json."""
    shutil.copytree(folder, target)
    (target / "generation_config.json").write_text(json.dumps(settings))
    return target


def unobeyed(folder: Path) -> dict[str, Any]:
    return unobeyed_settings(resolve_model(str(folder), cache_folder=folder))


def test_every_setting_of_transformers_is_known() -> None:
    assert vars(GenerationConfig()).keys() == DRAWING.keys() | OTHER
    assert not DRAWING.keys() & OTHER


@pytest.mark.parametrize("key", sorted(DRAWING))
def test_a_setting_that_changes_what_is_drawn_is_named(tiny: Tiny, tmp_path: Path, key: str) -> None:
    value = next(each for each in (False, 3) if each not in DRAWING[key])
    assert unobeyed(stating(tiny(), tmp_path / "model", **{key: value})) == {key: value}
    for at, neutral in enumerate((None, [], *DRAWING[key])):
        assert unobeyed(stating(tiny(), tmp_path / str(at), **{key: neutral})) == {}


def test_settings_of_config_json_count_where_there_is_no_other_file(tiny: Tiny, tmp_path: Path) -> None:
    folder = stating(tiny(), tmp_path / "model")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "suppress_tokens": [3, 4]}))
    assert unobeyed(folder) == {}
    (folder / "generation_config.json").unlink()
    assert unobeyed(folder) == {"suppress_tokens": [3, 4]}


@pytest.mark.parametrize("command", ["plan"])
def test_the_plan_names_what_is_not_obeyed(tiny: Tiny, tmp_path: Path, command: str) -> None:
    settings = {"do_sample": True, "temperature": 0.6, "eos_token_id": [0, 4], "suppress_tokens": list(range(90))}
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    for name, folder in (("stating", stating(tiny(), tmp_path / "model", **settings)), ("plain", tiny())):
        job = {
            "input": {"path": str(tmp_path / "in.jsonl")},
            "output": {"path": str(tmp_path / "out")},
            "base": {"model": str(folder)},
            "principals": {},
        }
        (tmp_path / "job.yaml").write_text(json.dumps(job))
        done = cage(command, "-c", str(tmp_path / "job.yaml"))
        assert done.returncode == 0, done.stderr
        line = (
            "generation_config.json of base says suppress_tokens (90 values), temperature 0.6; that is not obeyed, "
            "decoding says how tokens are drawn"
        )
        assert (line in done.stdout.splitlines()) == (name == "stating")


def test_each_of_several_ends_ends_an_answer(tiny: Tiny, tmp_path: Path) -> None:
    """With every byte an end, each answer is empty."""
    folder = stating(tiny(), tmp_path / "model", eos_token_id=list(range(261)))
    with Aligner(str(folder), {}, slots=2, max_new_tokens=8) as aligner:
        assert [(each.text, each.finish_reason) for each in aligner.generate(["hello", "x"])] == [("", "stop")] * 2


@pytest.mark.parametrize("ends", ["<|end|>", [0, "<|end|>"], [[0]], {"a": 0}, 1.5])
def test_ends_that_are_no_ids_are_refused_by_name(tiny: Tiny, tmp_path: Path, ends: Any) -> None:
    folder = stating(tiny(), tmp_path / "model", eos_token_id=ends)
    with pytest.raises(
        ConfigurationError, match=r"model: eos_token_id of generation_config.json must be a whole numb"
    ):
        Aligner(folder)
