"""States of cache rows: what linear attention, SSMs and short convolutions keep of a row beside keys and values.

Which layers keep states, and of which shapes, is learned from transformers' own cache once, when a model is loaded.
A pass then gets a cache of the same classes whose tensors are the rows' own. Attention layers keep nothing in it: the
slot cache has their keys and values.

R rows of a pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from pipeline.attention.visibility import NotServed

ATTENTION_CLASSES = (DynamicLayer, DynamicSlidingWindowLayer)
HYBRID_CLASSES = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
LEARNT_LENGTHS = (5, 3)  # tokens of the passes that learn: a state's shape does not depend on them
CONVOLUTION, RECURRENCE = "conv_states", "recurrent_states"  # attributes of transformers' cache layers


@dataclass(frozen=True, slots=True)
class State:
    """One state of a layer.

    Args:
        name: the attribute of transformers' cache layer that holds it.
        index: which of the layer's states of that name.
        shape: of one row.
        dtype: of its numbers.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

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
    """

    attends: bool = False
    number_of_states: int = 0
    states: tuple[State, ...] = ()
    kernel_sizes: Mapping[int, int | None] = field(default_factory=dict)


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
        found.append(tuple(map(_describe, cache.layers)))
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


def _describe(layer: Any) -> CachedLayer:
    kind = type(layer)
    if kind is DummyLayer:
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
            states.append(State(name, index, tuple(state.shape[1:]), state.dtype))
    attends = kind in HYBRID_CLASSES and layer.is_initialized
    return CachedLayer(attends, layer.number_of_states, tuple(states), dict(layer.conv_kernel_size))


class SlotStates:
    """The states of all cache rows, each [rows, ...].

    Args:
        layers: of the model, as `learn_states` found them.
        num_rows: cache rows.
        device: where they are.
    """

    def __init__(self, layers: Sequence[CachedLayer], num_rows: int, device: torch.device) -> None:
        self._layers = layers
        self._buffers: list[list[Tensor]] = [
            [torch.zeros(num_rows, *state.shape, dtype=state.dtype, device=device) for state in layer.states]
            for layer in layers
        ]

    def copy(self, source: int, row: int) -> None:
        """Copy all states of a row to another one."""
        for buffers in self._buffers:
            for buffer in buffers:
                buffer[row] = buffer[source]

    def begin(self, rows: slice | Tensor, *, has_previous: bool) -> PassCache:
        """A cache for a pass over these rows; give it back to `end`.

        Args:
            rows: a range, whose states change in place, or numbers [R], of which copies are made.
            has_previous: whether the rows have read anything yet.
        """
        return PassCache(self._layers, [[each[rows] for each in buffers] for buffers in self._buffers], has_previous)

    def end(self, cache: PassCache, rows: slice | Tensor, num_rows: int) -> None:
        """Write back what a pass made of the first `num_rows` of its rows."""
        for layer, cached, buffers in zip(self._layers, cache.layers, self._buffers, strict=True):
            for state, buffer in zip(layer.states, buffers, strict=True):
                made = getattr(cached, state.name)[state.index]
                if isinstance(rows, Tensor):
                    buffer.index_copy_(0, rows[:num_rows], made[:num_rows])
                elif made.data_ptr() != buffer[rows].data_ptr():
                    buffer[rows] = made


def bytes_per_row(layers: Sequence[CachedLayer]) -> int:
    """Bytes of all states of one row."""
    return sum(state.num_bytes for layer in layers for state in layer.states)


class _Keys(CacheLayerMixin):  # type: ignore[misc]
    """An attention layer, whose keys and values the slot cache holds."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values: the attention itself finds those before them."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is made of it."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Rows of a pass have lengths of their own."""
        raise NotServed("it asks for the length of its cache, and rows in slots have lengths of their own")

    def get_max_length(self) -> int:
        """There is none."""
        return -1


class _KeysAndStates(LinearAttentionLayer, _Keys):  # type: ignore[misc]
    """A layer with attention and states."""

    is_compileable = False

    def __init__(self, number_of_states: int) -> None:
        _Keys.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


class PassCache(Cache):  # type: ignore[misc]
    """transformers' cache of one pass.

    Args:
        layers: of the model.
        states_R: of the pass's rows, by layer.
        has_previous: whether the rows have read anything yet.
    """

    def __init__(
        self, layers: Sequence[CachedLayer], states_R: Sequence[Sequence[Tensor]], has_previous: bool
    ) -> None:
        made = [_layer(layer, states, has_previous) for layer, states in zip(layers, states_R, strict=True)]
        super().__init__(layers=made)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Rows of a pass have positions of their own."""
        raise NotServed("it asks for the position of its cache, and rows in slots have positions of their own")


def _layer(layer: CachedLayer, states_R: Sequence[Tensor], has_previous: bool) -> Any:
    if not layer.number_of_states:
        return _Keys() if layer.attends else DummyLayer()
    make = _KeysAndStates if layer.attends else LinearAttentionLayer
    made = make(number_of_states=layer.number_of_states)
    for index, size in layer.kernel_sizes.items():
        made.conv_kernel_size[index] = size
        made.has_previous_state[index] = has_previous
    for state, rows_R in zip(layer.states, states_R, strict=True):
        getattr(made, state.name)[state.index] = rows_R
        getattr(made, f"is_{state.name}_initialized")[state.index] = True
        made.device, made.dtype = rows_R.device, rows_R.dtype
    return made
