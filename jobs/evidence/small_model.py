"""A model smaller than the embedded one: its first layers. No other model with its tokens comes with the project."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.hub.embedded import default_cache_folder
from pipeline.hub.sources import fetch_weights, resolve_model

LAYERS = 15  # of 30


def write_small_model(base: str, place: Path, layers: int = LAYERS) -> None:
    """Write a model of the first layers of another one, with its embeddings, final norm, head and tokenizer.

    Args:
        base: folder, hub id or name of a model whose layers are all alike.
        place: folder of the new one.
        layers: how many it has.

    Raises:
        ValueError: the base has no more than that.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = default_cache_folder(os.environ)
    folder = fetch_weights(resolve_model(base, cache_folder=cache), cache_folder=cache)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if layers >= model.config.num_hidden_layers:
        raise ValueError(f"{base} has {model.config.num_hidden_layers} layers; layers must be fewer, got {layers}")
    model.config.num_hidden_layers = layers
    model.model.layers = model.model.layers[:layers]
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = kinds[:layers]
    aside = place.with_suffix(".aside")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(folder).save_pretrained(aside)
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)
