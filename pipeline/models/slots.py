"""The slot cache: keys and values of many running rows, each at its own positions, and attention over them.

A cache row belongs to one (slot, role). A decode pass takes any set of cache rows, writes each row's new key at the
row's own next position and attends over the row's own length: nothing is padded to the left, nothing is shared.

R rows of a pass, H query heads, G key-value heads, T tokens, D head width, L capacity of a cache row in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION = "cage_slots"
CAPACITY_STEP = 256


@dataclass(frozen=True, slots=True)
class SlotPass:
    """One forward pass. `lengths` counts each row's tokens after the pass; `rows_R` its places in the cache.

    A prefill has one row and starts it from nothing. `per_row` attends row by row over exact lengths, so that
    no row's bits depend on its company; otherwise one masked call serves the batch.
    """

    cache: SlotCache | None
    rows_R: Tensor
    lengths: tuple[int, ...]
    is_prefill: bool
    per_row: bool


_active: ContextVar[SlotPass] = ContextVar("cage_slot_pass")


@contextmanager
def running(slot_pass: SlotPass) -> Iterator[None]:
    """Make `slot_pass` the one that the model's attention and cache serve."""
    token = _active.set(slot_pass)
    try:
        yield
    finally:
        _active.reset(token)


class SlotCache(Cache):  # type: ignore[misc]
    """Per-layer buffers [rows, G, L, D]; L grows as rows get longer."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write this pass's keys and values [R, G, T, D] of one layer; return them as they are."""
        slot_pass = _active.get()
        if layer_idx == len(self.keys):
            shape = (self.num_rows, key_states.shape[1], CAPACITY_STEP)
            self.keys.append(key_states.new_zeros(*shape, key_states.shape[-1]))
            self.values.append(value_states.new_zeros(*shape, value_states.shape[-1]))
        needed = max(slot_pass.lengths)
        self.keys[layer_idx] = _with_capacity(self.keys[layer_idx], needed)
        self.values[layer_idx] = _with_capacity(self.values[layer_idx], needed)
        if slot_pass.is_prefill:
            row = slot_pass.rows_R[0]
            self.keys[layer_idx][row, :, :needed] = key_states[0]
            self.values[layer_idx][row, :, :needed] = value_states[0]
        else:
            last_R = torch.tensor(slot_pass.lengths, device=key_states.device) - 1
            self.keys[layer_idx][slot_pass.rows_R, :, last_R] = key_states[:, :, 0]
            self.values[layer_idx][slot_pass.rows_R, :, last_R] = value_states[:, :, 0]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        slot_pass = _active.get()
        return 0 if slot_pass.is_prefill else max(slot_pass.lengths) - 1

    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all layers; 0 before the first pass."""
        buffers = [*self.keys, *self.values]
        return sum(buffer.element_size() * buffer.shape[1] * buffer.shape[3] for buffer in buffers)


def _with_capacity(buffer: Tensor, num_tokens: int) -> Tensor:
    capacity = buffer.shape[2]
    if num_tokens <= capacity:
        return buffer
    capacity = max(2 * capacity, -(-num_tokens // CAPACITY_STEP) * CAPACITY_STEP)
    grown = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [R, H, T, D] to output [R, T, H, D]."""
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with a logit softcap or attention sinks is not supported")
    slot_pass = _active.get()
    if slot_pass.is_prefill:
        out = _attend_prefill(query, key, value, scaling, sliding_window)
    else:
        assert slot_pass.cache is not None
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        keys, values = slot_pass.cache.keys[layer], slot_pass.cache.values[layer]
        attend_rows = _attend_each_row if slot_pass.per_row else _attend_batch
        out = attend_rows(query, keys, values, slot_pass, scaling, sliding_window)
    return out.transpose(1, 2), None


def _attend_prefill(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    num_tokens = query.shape[2]
    mask = None
    if window is not None and window < num_tokens:
        at = torch.arange(num_tokens, device=query.device)
        distance = at[:, None] - at[None, :]
        mask = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _attend_each_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_pass: SlotPass,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One call per row over its own length: the query heads of a key-value head are its query tokens."""
    num_kv_heads, width = keys.shape[1], keys.shape[3]
    out = query.new_empty(*query.shape[:3], values.shape[3])
    for at, (row, length) in enumerate(zip(slot_pass.rows_R.tolist(), slot_pass.lengths, strict=True)):
        start = 0 if window is None else max(0, length - window)
        out[at] = scaled_dot_product_attention(
            query[at].view(1, num_kv_heads, -1, width),
            keys[row, None, :, start:length],
            values[row, None, :, start:length],
            scale=scaling,
        ).view(query.shape[1], 1, -1)
    return out


def _attend_batch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_pass: SlotPass,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One masked call over the longest live length."""
    longest = max(slot_pass.lengths)
    lengths_R1 = torch.tensor(slot_pass.lengths, device=query.device)[:, None]
    at_L = torch.arange(longest, device=query.device)[None, :]
    mask_RL = at_L < lengths_R1
    if window is not None:
        mask_RL &= at_L >= lengths_R1 - window
    num_rows, num_heads, _, width = query.shape
    num_kv_heads = keys.shape[1]
    out = scaled_dot_product_attention(
        query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, width),
        keys[:, :, :longest].index_select(0, slot_pass.rows_R),
        values[:, :, :longest].index_select(0, slot_pass.rows_R),
        attn_mask=mask_RL[:, None, None, :],
        scale=scaling,
    )
    return out.reshape(num_rows, num_heads, 1, -1)


AttentionInterface.register(ATTENTION, attend)
