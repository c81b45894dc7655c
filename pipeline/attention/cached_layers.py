"""What a model's cache holds of a row: learned from transformers' own cache, when a model is loaded or planned."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from pipeline.attention.visibility import NotServed

# of layers that keep nothing; versions before 5.23 have none, and give them states that stay empty
NOTHING = getattr(cache_utils, "DummyLayer", None)
ATTENTION_CLASSES = (DynamicLayer, DynamicSlidingWindowLayer)
HYBRID_CLASSES = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
LEARNT_LENGTHS = (5, 3)  # tokens of the passes that learn: a state's shape does not depend on them
# RecurrentGemma keeps the states of a text on its modules, not in the cache
MODULE_STATES = ("recurrent_states", "conv1d_state")
CONVOLUTION, RECURRENCE = "conv_states", "recurrent_states"  # attributes of transformers' cache layers


@dataclass(frozen=True, slots=True)
class State:
    """One state of a layer.

    Args:
        name: the attribute of transformers' cache layer that holds it.
        index: which of the layer's states of that name.
        shape: of one row.
        dtype: of its numbers.
        device: of its layer.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = field(compare=False)  # a plan has none, and compares

    @property
    def num_bytes(self) -> int:
        """Bytes of one row."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """What transformers' cache holds of one layer.

    Args:
        attends: whether it holds keys and values.
        number_of_states: of each name.
        states: what it holds beside them.
        kernel_sizes: of the layer's convolutions.
        module: the path of the module that keeps the states itself, instead of the cache.
    """

    attends: bool = False
    number_of_states: int = 0
    states: tuple[State, ...] = ()
    kernel_sizes: Mapping[int, int | None] = field(default_factory=dict)
    module: str | None = None


def cache_argument(model: Any) -> str:
    """The name under which a model's forward pass takes a cache."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.inference_mode()
def learn_states(model: Any) -> tuple[CachedLayer, ...]:
    """What the model's cache holds, by layer; learned from passes with the attention that the model has now.

    Raises:
        NotServed: it holds what slots cannot.
    """
    if not model._supports_default_dynamic_cache():
        raise NotServed("it keeps its states in a cache of its own class")
    found: list[tuple[CachedLayer, ...]] = []
    for length in LEARNT_LENGTHS:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        ids = torch.arange(1, length + 1, device=model.device)[None]
        inputs = {"input_ids": ids, cache_argument(model): cache}
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = ids - 1  # else it asks the cache, which has no length without attention
        model(**inputs, use_cache=True)
        found.append((*map(_describe, cache.layers), *_states_of_modules(model)))
    if found[0] != found[1]:
        raise NotServed("its states have a size that depends on the length of the text")
    if not any(layer.states for layer in found[0]):
        raise NotServed("its layers keep their states elsewhere than in transformers' cache")
    return found[0]


def cache_of_config(config: Any, dtype: str) -> tuple[CachedLayer, ...]:
    """What the cache of a model with this configuration would hold, by layer; no weights are made.

    Args:
        config: of transformers, of a family that transformers ships.
        dtype: of the weights, such as "bfloat16".

    Raises:
        NotServed: it would hold what slots cannot.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if type(model)._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # which reads no numbers: there are none
    return learn_states(model.eval())


def _states_of_modules(model: Any) -> list[CachedLayer]:
    """What modules keep of the last pass themselves."""
    found = []
    for path, module in model.named_modules():
        kept = {name: vars(module)[name] for name in MODULE_STATES if vars(module).get(name) is not None}
        if kept:
            states = [
                State(name, 0, tuple(state.shape[1:]), state.dtype, state.device) for name, state in kept.items()
            ]
            found.append(CachedLayer(states=tuple(states), module=path))
    return found


def _describe(layer: Any) -> CachedLayer:
    kind = type(layer)
    if kind is NOTHING:
        return CachedLayer()
    if kind in ATTENTION_CLASSES:
        return CachedLayer(attends=layer.is_initialized)
    if kind is not LinearAttentionLayer and kind not in HYBRID_CLASSES:
        raise NotServed(f"its cache has a {kind.__name__}, which slots do not hold")
    states = []
    for name in (CONVOLUTION, RECURRENCE):
        for index, state in getattr(layer, name).items():
            if state is None:
                continue
            if state.shape[0] != 1:
                raise NotServed(f"{name} of its {kind.__name__} have no dimension for rows")
            states.append(State(name, index, tuple(state.shape[1:]), state.dtype, state.device))
    attends = kind in HYBRID_CLASSES and layer.is_initialized
    return CachedLayer(attends, layer.number_of_states, tuple(states), dict(layer.conv_kernel_size))


def bytes_per_row(layers: Sequence[CachedLayer]) -> Counter[torch.device]:
    """Bytes of all states of one row, by device."""
    found: Counter[torch.device] = Counter()
    for layer in layers:
        for state in layer.states:
            found[state.device] += state.num_bytes
    return found
