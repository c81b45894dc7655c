"""Families of models of one kind, of which a test takes one in every run and the others nightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from jobs.families.configurations import FAMILIES, make_config
from pipeline.hub.families import keeps_states, read_table
from pipeline.hub.model_facts import as_mapping


def entry_of(name: str) -> tuple[Any, ...]:
    """What the table says of a family, without its reasons' words."""
    family = read_table().families[name]
    return str(replace(family, reasons={})), frozenset(family.reasons), FAMILIES[name].is_composite


def layers_of(name: str) -> tuple[Any, ...]:
    """The kinds of a family's layers, for which hosts have code of their own."""
    text: Any = make_config(name).get_text_config(decoder=True)
    types = frozenset(getattr(text, "layer_types", None) or ())
    has_window = bool(getattr(text, "sliding_window", None))
    return types, has_window, bool(text.base_model_ep_plan), keeps_states(as_mapping(text))


def of_each_kind(names: Sequence[str]) -> set[str]:
    """A family for each kind of entry in the table, and one for each kind of layers that these do not have."""
    chosen = {entry_of(name): name for name in reversed(names)}
    layers = set(map(layers_of, chosen.values()))
    others = {layers_of(name): name for name in reversed(names)}
    return {*chosen.values(), *(name for kind, name in others.items() if kind not in layers)}


def others_nightly(names: Sequence[str]) -> list[Any]:
    """Parameters of a test: all families, those that are not the one of their kind marked nightly."""
    in_every_run = of_each_kind(names)
    return [name if name in in_every_run else pytest.param(name, marks=pytest.mark.nightly) for name in names]
