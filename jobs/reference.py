"""Writes docs/configuration.md: every key of a configuration with its type, default and meaning.

    python -m jobs.reference > docs/configuration.md

The typed sections are the only source. A test compares the page with them.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from datetime import datetime
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typing_extensions import TypeAliasType

from pipeline.advice.settings import AdviseConfig
from pipeline.config.sections import Config
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.judges.interface import JudgeConfig
from pipeline.principals.section import PrincipalSection
from pipeline.sections import ModelConfig
from pipeline.synthesis.settings import SynthesizeConfig
from pipeline.training.settings import TrainConfig

HEAD = """# Configuration

Every key of a configuration file, with its type, default and meaning. A command takes a file (`-c job.yaml`) and
overrides (`decoding.temperature=0.7`). `cage relabel -c job.yaml --print-config` shows a whole configuration with all
defaults. This page is made from the code by `python -m jobs.reference > docs/configuration.md`.

A key without a default must be given. A model may be a name instead of its section: `base: smollm2-135m`.
"""
KIND = "kind"
SIMPLE = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    datetime: "date or time",
    Any: "any value",
}


def render() -> str:
    """The page."""
    parts = [HEAD]
    parts += ["## A run\n", "For `cage plan`, `cage relabel` and the sections that other commands share.\n"]
    shown: set[type[BaseModel]] = set()
    for name, field in Config.model_fields.items():
        parts += _section(name, field, shown)
    for title, command, config, names in (
        ("Evaluation", "cage evaluate", EvaluateConfig, ("evaluation",)),
        ("Training data", "cage synthesize", SynthesizeConfig, ("synthesis",)),
        ("Advice", "cage advise", AdviseConfig, ("advise",)),
        ("Training", "cage train", TrainConfig, tuple(TrainConfig.model_fields)),
    ):
        parts.append(f"## {title}\n\nFor `{command}`.\n")
        for name in names:
            suffix = f" of {command}" if name in Config.model_fields else ""
            parts += _section(name, config.model_fields[name], shown, suffix)
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its place: what the page has to explain."""
    for config in (EvaluateConfig, SynthesizeConfig, AdviseConfig, TrainConfig):
        for name, field in config.model_fields.items():
            yield from _keys_below(name, field, frozenset())


def _keys_below(place: str, field: FieldInfo, above: frozenset[type[BaseModel]]) -> Iterator[tuple[str, FieldInfo]]:
    inner = [each for each in _models(field.annotation) if each not in above]
    if not inner:
        yield place, field
    for model in inner:
        for name, child in model.model_fields.items():
            yield from _keys_below(f"{place}.{name}", child, above | {model})


def _section(place: str, field: FieldInfo, shown: set[type[BaseModel]], suffix: str = "") -> Iterator[str]:
    """The tables of a section and of those within it, where they were not shown before; `suffix` ends the titles."""
    models = [model for model in _models(field.annotation) if model not in shown]
    for model in models:
        shown.add(model)
        kind = _kind_of(model)
        title = f"{place}" if kind is None else f"{_stem(place, model)}: kind {kind}"
        yield f"### {title}{suffix}\n\n{_summary(model)}\n"
        yield _table(model)
        for name, child in model.model_fields.items():
            inner = place if kind is None else f"{place}.NAME"
            yield from _section(f"{inner}.{name}", child, shown, suffix)


def _stem(place: str, model: type[BaseModel]) -> str:
    return place.removesuffix(".NAME") if issubclass(model, (PrincipalSection, JudgeConfig)) else place


def _table(model: type[BaseModel]) -> str:
    """The keys of one section."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", _type(field.annotation), _default(field), _meaning(name, field, model))
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _meaning(name: str, field: FieldInfo, model: type[BaseModel]) -> str:
    if field.description:
        return field.description
    if name == KIND:
        return "which section this is"
    inner = _models(field.annotation)
    return _summary(inner[0]).partition("\n")[0] if inner else ""


def _summary(model: type[BaseModel]) -> str:
    """What the section is, from its docstring, on one line a paragraph."""
    text = (model.__doc__ or "").strip()
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "-"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its keys' defaults"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(each)}" for key, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(annotation: Any) -> str:
    """A type in words."""
    if isinstance(annotation, TypeAliasType):
        return "any value" if "Json" in annotation.__name__ else _type(annotation.__value__)
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_type, get_args(annotation))))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{each.value}`" for each in annotation)
    if isinstance(annotation, type) and issubclass(annotation, ModelConfig):
        return "model"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        of_each = [each for each in arguments if each is not Ellipsis]
        return f"list of {_type(of_each[0])}" if Ellipsis in arguments else f"list of {len(of_each)}"
    if get_origin(annotation) is dict:
        return f"{_type(arguments[1])} by name"
    if annotation is NoneType:
        return "null"
    return SIMPLE.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _kind_of(model: type[BaseModel]) -> str | None:
    """The one value of `kind` that selects a section; None where it has no kind, or several."""
    field = model.model_fields.get(KIND)
    values = [] if field is None else get_args(field.annotation)
    return str(values[0]) if len(values) == 1 else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections in an annotation, each once."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, TypeAliasType):
        return []
    found = [model for each in typing.get_args(annotation) for model in _models(each)]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    sys.stdout.write(render())
