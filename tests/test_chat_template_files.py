"""Chat templates wherever a model's files keep them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import Aligner
from pipeline.errors import ConfigurationError
from pipeline.hub.sources import resolve_model
from pipeline.hub.tokenizer_facts import facts_of_tokenizer, load_tokenizer, read_tokenizer_facts

Tiny = Callable[..., Path]
TEMPLATE, OTHER = "chat_template.jinja", "{{ messages[0].content }}"


def keeping(folder: Path, target: Path, *, stated: Any = None, files: dict[str, str] | None = None) -> Path:
    """A copy of a model with its chat template elsewhere."""
    shutil.copytree(folder, target)
    (target / TEMPLATE).unlink()
    settings = json.loads((target / "tokenizer_config.json").read_text())
    if stated is not None:
        settings["chat_template"] = stated
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in (files or {}).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text)
    return target


def kept(template: str) -> dict[str, dict[str, Any]]:
    """Every place of a template, as arguments of `keeping`."""
    return {
        "a file": {"files": {TEMPLATE: template}},
        "the file before the settings": {"files": {TEMPLATE: template}, "stated": OTHER},
        "the settings": {"stated": template},
        "named ones in a list": {
            "stated": [{"name": "rag", "template": OTHER}, {"name": "default", "template": template}]
        },
        "named ones in a mapping": {"stated": {"default": template, "rag": OTHER}},
        "a file beside named ones": {"files": {TEMPLATE: template, "additional_chat_templates/rag.jinja": OTHER}},
        "a processor's file": {"files": {"chat_template.json": json.dumps({"chat_template": template})}},
    }


@pytest.mark.parametrize("place", list(kept("")))
def test_a_template_is_found_wherever_it_is_kept(tiny: Tiny, tmp_path: Path, place: str) -> None:
    template = (tiny() / TEMPLATE).read_text()
    folder = keeping(tiny(), tmp_path / "model", **kept(template)[place])
    source = resolve_model(str(folder), cache_folder=tmp_path)
    assert read_tokenizer_facts(source).chat_template == template
    assert facts_of_tokenizer(load_tokenizer(source)) == read_tokenizer_facts(source)


def test_answers_are_the_same_wherever_the_template_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    prompts = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]]

    def answer(folder: Path) -> str:
        with Aligner(str(folder), {}, slots=1, max_new_tokens=8) as aligner:
            return aligner.generate(prompts)[0].text

    expected = answer(tiny())
    for at, place in enumerate(kept((tiny() / TEMPLATE).read_text()).values()):
        assert answer(keeping(tiny(), tmp_path / str(at), **place)) == expected


def test_named_templates_without_a_default_are_refused_by_name_unless_one_is_given(
    tiny: Tiny, tmp_path: Path
) -> None:
    named = [{"name": "tool_use", "template": OTHER}, {"name": "rag", "template": OTHER}]
    folder = str(keeping(tiny(), tmp_path / "model", stated=named))
    message = (
        "tokenizer of base has chat templates named rag, tool_use and none named default; give .* base.chat_template"
    )
    with pytest.raises(ConfigurationError, match=message):
        Aligner(folder, {}, slots=1)
    with Aligner({"model": folder, "chat_template": OTHER}, {}, slots=1, max_new_tokens=2) as aligner:
        assert aligner.generate(["hello"])[0].num_tokens
