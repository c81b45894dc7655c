"""A model's first layers, followed by its own norm and head: an early exit, which proposes tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from pipeline.hub.model_facts import text_config


def keep_first_layers(config: Any, count: int) -> None:
    """Have a transformers configuration describe the first `count` layers: lists by layer are cut as well."""
    text = text_config(config)
    whole = text.num_hidden_layers
    by_layer = [name for name, value in vars(text).items() if isinstance(value, list) and len(value) == whole]
    for name in by_layer:
        setattr(text, name, getattr(text, name)[:count])
    text.num_hidden_layers = count


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from printing the names of the weights that are left out on purpose."""
    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def without_later_layers(report: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """transformers' report on the weights of a model, without those of layers from `count` on, which it has no place
    for."""
    kept = {name for name in report["unexpected_keys"] if not _is_later(name, count)}
    return {**report, "unexpected_keys": kept}


def _is_later(name: str, count: int) -> bool:
    number = re.search(r"\.(\d+)\.", name)
    return number is not None and int(number[1]) >= count
