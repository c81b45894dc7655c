"""Branches: what would follow a row, read over the row's own keys and values in one forward pass.

A reading continues a row by trunk tokens, which stay, and forks branches off it, which are forgotten afterwards. A
branch's token attends to the row up to its fork and to its own branch. Several rows may share a pass; each attends
to its own keys alone.

H query heads, G key-value heads, T tokens of a reading, L tokens that its row keeps, S keys, D head width,
C capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.attention.capacity import capacity_for

ATTENTION = "cage_branches"


@dataclass(slots=True, eq=False)
class RowCache:
    """Keys and values of one row, [G, C, D] a layer, and the tokens that they are of."""

    tokens: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def bytes_per_token(self) -> int:
        """Bytes that a token takes, over all layers; 0 before the first pass."""
        return sum(each.element_size() * each.shape[0] * each.shape[2] for each in (*self.keys, *self.values))

    def take_over(self, other: RowCache, count: int) -> None:
        """Hold the first `count` tokens of another row."""
        for layer, (keys_GCD, values_GCD) in enumerate(zip(other.keys, other.values, strict=True)):
            self.write(layer, 0, keys_GCD[:, :count], values_GCD[:, :count])
        self.tokens = other.tokens[:count]

    def write(self, layer: int, start: int, keys_GTD: Tensor, values_GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Put a reading's keys and values behind the first `start`; return all, [G, start + T, D]."""
        stop = start + keys_GTD.shape[1]
        return (
            _written(self.keys, layer, start, stop, keys_GTD),
            _written(self.values, layer, start, stop, values_GTD),
        )


def _written(buffers: list[Tensor], layer: int, start: int, stop: int, new_GTD: Tensor) -> Tensor:
    if layer == len(buffers):
        buffers.append(new_GTD.new_empty(new_GTD.shape[0], 0, new_GTD.shape[2]))
    buffer = buffers[layer]
    if stop > buffer.shape[1]:
        grown = new_GTD.new_empty(buffer.shape[0], capacity_for(stop), buffer.shape[2])
        grown[:, :start] = buffer[:, :start]
        buffer = buffers[layer] = grown
    buffer[:, start:stop] = new_GTD
    return buffer[:, :stop]


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that would follow the row's first `fork` tokens."""

    fork: int
    tokens: Sequence[int]


class Reading:
    """What one row reads in a pass: after its first `kept` tokens the trunk, then every branch.

    `tokens` and `positions` are those of the trunk and of the branches, one after another.
    """

    def __init__(self, cache: RowCache, kept: int, trunk: Sequence[int], branches: Sequence[Branch] = ()) -> None:
        self.cache = cache
        self.kept = kept
        self.trunk = list(trunk)
        self.tokens = list(trunk)
        self.positions = [kept + at for at in range(len(trunk))]
        self.is_prefill = kept == 0 and not branches  # plain causal attention
        # by token: keys of the row that it sees, and which branch it belongs to
        self._limits = [position + 1 for position in self.positions]
        self._owners = [-1] * len(trunk)
        for owner, branch in enumerate(branches):
            self.tokens += branch.tokens
            self.positions += [branch.fork + at for at in range(len(branch.tokens))]
            self._limits += [branch.fork] * len(branch.tokens)
            self._owners += [owner] * len(branch.tokens)
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """Who sees whom, [T, L + T]."""
        if window not in self._masks:
            self._masks[window] = self._make_mask(window).to(device)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> Tensor:
        num_trunk = len(self.trunk)
        positions_T, owners_T = torch.tensor(self.positions), torch.tensor(self._owners)
        at_row = torch.arange(self.kept + num_trunk)
        sees_row = at_row < torch.tensor(self._limits)[:, None]
        own = owners_T[:, None] == owners_T[num_trunk:]
        sees_branch = own & (positions_T[num_trunk:] <= positions_T[:, None])
        seen_TS = torch.cat([sees_row, sees_branch], -1)
        if window is not None:
            seen_TS &= positions_T[:, None] - torch.cat([at_row, positions_T[num_trunk:]]) < window
        return seen_TS

    def begin(self) -> None:
        """Let the row forget what it does not keep; a pass that fails leaves no more behind."""
        del self.cache.tokens[self.kept :]

    def end(self) -> None:
        """Let the row keep the trunk."""
        self.cache.tokens += self.trunk


_active: ContextVar[Sequence[Reading]] = ContextVar("cage_readings")


@contextmanager
def reading(readings: Sequence[Reading]) -> Iterator[None]:
    """Make these the readings that the model's attention serves, one after another along its tokens."""
    for each in readings:
        each.begin()
    token = _active.set(readings)
    try:
        yield
    finally:
        _active.reset(token)
    for each in readings:
        each.end()


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
    """Attention as transformers calls it, of all readings' tokens: query [1, H, T, D] to output [1, T, H, D]."""
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not supported")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    outputs = []
    start = 0
    for each in _active.get():
        part = slice(start, start + len(each.tokens))
        start = part.stop
        keys, values = each.cache.write(layer, each.kept, key[0, :, part], value[0, :, part])
        outputs.append(_attend(query[0, :, part], keys, values, each, scaling, sliding_window, softcap))
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


def _attend(
    query_HTD: Tensor,
    keys_GSD: Tensor,
    values_GSD: Tensor,
    each: Reading,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One row: the query heads of a key-value head are its query tokens. Output [H, T, D]."""
    num_heads, num_tokens, width = query_HTD.shape
    if each.is_prefill and softcap is None and (window is None or window >= num_tokens):
        return scaled_dot_product_attention(
            query_HTD[None], keys_GSD[None], values_GSD[None], is_causal=True, scale=scaling,
            enable_gqa=num_heads != keys_GSD.shape[0],
        )[0]  # fmt: skip
    num_shared = num_heads // keys_GSD.shape[0]
    grouped = query_HTD.reshape(keys_GSD.shape[0], num_shared * num_tokens, width)
    mask = each.mask(window, query_HTD.device).repeat(num_shared, 1)
    if softcap is None:
        out = scaled_dot_product_attention(
            grouped[None], keys_GSD[None], values_GSD[None], attn_mask=mask, scale=scaling
        )[0]
    else:
        scale = width**-0.5 if scaling is None else scaling
        scores = torch.tanh(grouped @ keys_GSD.transpose(1, 2) * scale / softcap) * softcap
        out = scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(values_GSD) @ values_GSD
    return out.reshape(num_heads, num_tokens, values_GSD.shape[-1])


AttentionInterface.register(ATTENTION, attend)
