"""The slot cache: keys and values of many running rows, each at its own positions, and attention over them.

A cache row belongs to one (slot, role). A forward pass takes any tokens of any rows, packed one after another: parts
of new prompts, then one token of each running row. Each key is written at its row's own position and a row attends
over its own length: nothing is padded to the left, nothing is shared.

R running rows of a pass, T packed tokens, H query heads, G key-value heads, D head width, L capacity of a cache row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class Segment:
    """Tokens [start, stop) of a prompt, for cache row `row`; computed together, after what stands before them."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Copied:
    """Tokens [start, stop) that `row` takes over from the cache row `source`."""

    source: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SlotPass:
    """One forward pass: the tokens of the segments, then one token a running row.

    `follows` are copied once they are written. `rows` are the running rows' places in the cache (`rows_R` as a
    tensor), `lengths` their tokens after the pass and `last_R` the position of the newest. `per_row` attends row by
    row over exact lengths, so that no row's bits depend on its company; otherwise one masked call serves the rows.
    Without a cache there are only segments from the start.
    """

    cache: SlotCache | None
    segments: Sequence[Segment]
    follows: Sequence[Copied]
    rows: Sequence[int]
    lengths: Sequence[int]
    rows_R: Tensor
    last_R: Tensor
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
        self.num_moves = 0  # how often a buffer was made or made anew
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write this pass's packed keys and values of one layer; return them as they are."""
        slot_pass = _active.get()
        keys, values = _packed(key_states)[0], _packed(value_states)[0]  # [G, T, D]
        if layer_idx == len(self.keys):
            shape = (self.num_rows, keys.shape[0], CAPACITY_STEP)
            self.keys.append(keys.new_zeros(*shape, keys.shape[-1]))
            self.values.append(values.new_zeros(*shape, values.shape[-1]))
            self.num_moves += 1
        self._reserve(layer_idx, max([*slot_pass.lengths, *(part.stop for part in slot_pass.segments)]))
        _write(self.keys[layer_idx], keys, slot_pass)
        _write(self.values[layer_idx], values, slot_pass)
        return key_states, value_states

    def reserve(self, num_tokens: int) -> None:
        """Have room for rows of so many tokens in every layer."""
        for layer in range(len(self.keys)):
            self._reserve(layer, num_tokens)

    def _reserve(self, layer: int, num_tokens: int) -> None:
        if num_tokens > self.keys[layer].shape[2]:
            self.keys[layer] = _with_capacity(self.keys[layer], num_tokens)
            self.values[layer] = _with_capacity(self.values[layer], num_tokens)
            self.num_moves += 1

    def copy(self, copied: Copied) -> None:
        """Copy between rows at once, in every layer."""
        for buffer in (*self.keys, *self.values):
            _copy(buffer, copied)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all layers; 0 before the first pass."""
        buffers = [*self.keys, *self.values]
        return sum(buffer.element_size() * buffer.shape[1] * buffer.shape[3] for buffer in buffers)


def _with_capacity(buffer: Tensor, num_tokens: int) -> Tensor:
    capacity = max(2 * buffer.shape[2], -(-num_tokens // CAPACITY_STEP) * CAPACITY_STEP)
    grown = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def _packed(states: Tensor) -> Tensor:
    """[1, heads, T, D], also where the batch dimension holds the tokens, as adapters need it."""
    return states if states.shape[0] == 1 else states.transpose(0, 2)


def _write(buffer: Tensor, states: Tensor, slot_pass: SlotPass) -> None:
    """Put packed states [G, T, D] at their rows' positions, then copy what rows take over from others."""
    at = 0
    for part in slot_pass.segments:
        count = part.stop - part.start
        buffer[part.row, :, part.start : part.stop] = states[:, at : at + count]
        at += count
    if slot_pass.lengths:
        buffer[slot_pass.rows_R, :, slot_pass.last_R] = states[:, at:].transpose(0, 1)
    for copied in slot_pass.follows:
        _copy(buffer, copied)


def _copy(buffer: Tensor, copied: Copied) -> None:
    part = slice(copied.start, copied.stop)
    buffer[copied.row, :, part] = buffer[copied.source, :, part]


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
    """Attention as transformers calls it, over packed tokens: query [1, H, T, D] to output [1, T, H, D], or the same
    with the tokens in the batch dimension."""
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with a logit softcap or attention sinks is not supported")
    slot_pass = _active.get()
    query_HTD = _packed(query)[0]
    out_HTD = query.new_empty(*query_HTD.shape[:2], value.shape[-1])
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    at = 0
    for part in slot_pass.segments:
        here = slice(at, at + part.stop - part.start)
        if part.start == 0:
            keys, values = _packed(key)[0][:, here], _packed(value)[0][:, here]
        else:
            assert slot_pass.cache is not None
            keys = slot_pass.cache.keys[layer][part.row, :, : part.stop]
            values = slot_pass.cache.values[layer][part.row, :, : part.stop]
        out_HTD[:, here] = _attend_segment(query_HTD[:, here], keys, values, scaling, sliding_window)
        at = here.stop
    if slot_pass.lengths:
        assert slot_pass.cache is not None
        keys, values = slot_pass.cache.keys[layer], slot_pass.cache.values[layer]
        attend_rows = _attend_each_row if slot_pass.per_row else _attend_batch
        query_RH1D = query_HTD[:, at:].transpose(0, 1)[:, :, None]
        out_HTD[:, at:] = attend_rows(query_RH1D, keys, values, slot_pass, scaling, sliding_window)[
            :, :, 0
        ].transpose(0, 1)
    out_THD = out_HTD.transpose(0, 1)
    return (out_THD[None] if query.shape[0] == 1 else out_THD[:, None]), None


def _attend_segment(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Query [H, T, D] of the last T of all tokens whose keys [G, L, D] are given; causal."""
    num_tokens, length = query.shape[1], keys.shape[1]
    mask = None
    if num_tokens < length or (window is not None and window < length):
        at = torch.arange(length, device=query.device)
        distance = at[length - num_tokens :, None] - at[None, :]
        mask = (distance >= 0) & (distance < (length if window is None else window))
    return scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[0] != keys.shape[0],
    )[0]  # fmt: skip


def _attend_each_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_pass: SlotPass,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One call per row over its own length: the query heads of a key-value head are its query tokens.

    Every call costs as much as its arithmetic on a small model: what can be cut into rows is cut at once.
    """
    num_rows, num_heads, _, width = query.shape
    num_kv_heads = keys.shape[1]
    queries = query.reshape(num_rows, 1, num_kv_heads, num_heads // num_kv_heads, width).unbind(0)
    key_rows, value_rows = keys[:, None].unbind(0), values[:, None].unbind(0)
    out = []
    for query_row, row, length in zip(queries, slot_pass.rows, slot_pass.lengths, strict=True):
        start = 0 if window is None else max(0, length - window)
        out.append(
            scaled_dot_product_attention(
                query_row,
                key_rows[row].narrow(2, start, length - start),
                value_rows[row].narrow(2, start, length - start),
                scale=scaling,
            )
        )
    return torch.cat(out).view(num_rows, num_heads, 1, -1)


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
    lengths_R1 = slot_pass.last_R[:, None] + 1
    at_L = torch.arange(longest, device=query.device)[None, :]
    mask_RL = at_L < lengths_R1
    if window is not None:
        mask_RL &= at_L >= lengths_R1 - window
    num_rows, num_heads, _, width = query.shape
    num_kv_heads = keys.shape[1]
    out = scaled_dot_product_attention(
        query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, width),
        keys[:, :, :longest].index_select(0, slot_pass.rows_R),
        values[:, :, :longest].index_select(0, slot_pass.rows_R),
        attn_mask=mask_RL[:, None, None, :],
        scale=scaling,
    )
    return out.reshape(num_rows, num_heads, 1, -1)


AttentionInterface.register(ATTENTION, attend)
