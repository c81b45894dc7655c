"""States of cache rows: what linear attention, SSMs and short convolutions keep of a row beside keys and values.

A pass gets a cache of transformers' own classes whose tensors are the rows' own. Attention layers keep nothing in
it: the slot cache has their keys and values.

R rows of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from pipeline.attention.cached_layers import NOTHING, CachedLayer
from pipeline.attention.visibility import NotServed


class SlotStates:
    """The states of all cache rows, each [rows, ...].

    Args:
        model: what they are of.
        layers: of the model, as `learn_states` found them.
        num_rows: cache rows.
    """

    def __init__(self, model: Any, layers: Sequence[CachedLayer], num_rows: int) -> None:
        self._layers = [layer for layer in layers if layer.module is None]
        self._modules = [(model.get_submodule(layer.module), layer) for layer in layers if layer.module is not None]
        self._buffers, self._module_buffers = (
            [
                [
                    torch.zeros(num_rows, *state.shape, dtype=state.dtype, device=state.device)
                    for state in layer.states
                ]
                for layer in each
            ]
            for each in (self._layers, [layer for _, layer in self._modules])
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return sum(buffer.nbytes for layer in (*self._buffers, *self._module_buffers) for buffer in layer)

    def copy(self, source: int, row: int) -> None:
        """Copy all states of a row to another one."""
        for buffers in (*self._buffers, *self._module_buffers):
            for buffer in buffers:
                buffer[row] = buffer[source]

    def begin(self, rows: slice | Tensor, *, has_previous: bool) -> PassCache:
        """A cache for a pass over these rows; give it back to `end`.

        Args:
            rows: a range, whose states change in place, or numbers [R], of which copies are made.
            has_previous: whether the rows have read anything yet.
        """
        for (module, layer), buffers in zip(self._modules, self._module_buffers, strict=True):
            for state, buffer in zip(layer.states, buffers, strict=True):
                setattr(module, state.name, _rows_of(buffer, rows) if has_previous else None)
        states_R = [[_rows_of(each, rows) for each in buffers] for buffers in self._buffers]
        return PassCache(self._layers, states_R, has_previous)

    def end(self, cache: PassCache, rows: slice | Tensor, num_rows: int) -> None:
        """Write back what a pass made of the first `num_rows` of its rows."""
        for layer, cached, buffers in zip(self._layers, cache.layers, self._buffers, strict=True):
            for state, buffer in zip(layer.states, buffers, strict=True):
                _write(buffer, rows, getattr(cached, state.name)[state.index], num_rows)
        for (module, layer), buffers in zip(self._modules, self._module_buffers, strict=True):
            for state, buffer in zip(layer.states, buffers, strict=True):
                _write(buffer, rows, getattr(module, state.name), num_rows)
                setattr(module, state.name, None)


def _rows_of(buffer: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of a layer's states, on the layer's device."""
    return buffer[rows.to(buffer.device) if isinstance(rows, Tensor) else rows]


def _write(buffer: Tensor, rows: slice | Tensor, made: Tensor, num_rows: int) -> None:
    """Write rows of states back, where a pass has not changed them in place."""
    if isinstance(rows, Tensor):
        buffer.index_copy_(0, rows[:num_rows].to(buffer.device), made[:num_rows])
    elif made.data_ptr() != buffer[rows].data_ptr():
        buffer[rows] = made


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
        return NOTHING() if NOTHING is not None and not layer.attends else _Keys()
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
