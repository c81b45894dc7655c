"""Candidate branches: possible continuations of a row, computed over the row's own keys and values in one pass.

A reading extends a row by trunk tokens, whose keys and values are kept, and adds branches, which are dropped after
the pass. A branch's token attends to the row up to where the branch starts (its fork) and to its own branch. Several
rows may share a pass; each attends to its own keys alone.

H query heads, G key-value heads, T tokens of a reading, L tokens that its row keeps, S keys, D head width,
C capacity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pipeline.attention.plain import AttentionTerms, attend_by_terms
from pipeline.attention.visibility import ALL_ALIKE, LayerFacts, Visibility
from pipeline.protocol.capacity import capacity_for

ATTENTION = "cage_branches"


@dataclass(slots=True, eq=False)
class RowCache:
    """Keys and values of one row, [G, C, D] per layer.

    Args:
        tokens: the token ids whose keys and values are valid; buffers may hold others behind them.
        keys: by layer.
        values: by layer.
    """

    tokens: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def bytes_per_token(self) -> Counter[torch.device]:
        """Bytes per token over all layers, by device; none before the first pass."""
        found: Counter[torch.device] = Counter()
        for each in (*self.keys, *self.values):
            found[each.device] += each.element_size() * each.shape[0] * each.shape[2]
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(each.nbytes for each in (*self.keys, *self.values))

    def take_over(self, other: RowCache, count: int) -> None:
        """Copy the first `count` tokens of another row; what this row held before is overwritten."""
        for layer, (keys_GCD, values_GCD) in enumerate(zip(other.keys, other.values, strict=True)):
            self.write(layer, 0, keys_GCD[:, :count], values_GCD[:, :count])
        self.tokens = other.tokens[:count]

    def write(self, layer: int, start: int, keys_GTD: Tensor, values_GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write a reading's keys and values behind the first `start`, and return all of them, [G, start + T, D]."""
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
    """A possible continuation of a row.

    Args:
        fork: the number of the row's tokens that come before it.
        tokens: its token ids.
    """

    fork: int
    tokens: Sequence[int]


class Reading:
    """What one row reads in a pass: after its first `kept` tokens the trunk, then every branch.

    Args:
        cache: of the row.
        kept: how many of the cached tokens stay; the others are overwritten.
        trunk: token ids that the row keeps after the pass.
        branches: continuations, which are dropped after the pass.

    Attributes:
        tokens: of the trunk and of the branches, one after another.
        positions: of these tokens in the row. All branches with one fork have the same positions.
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
        self._masks: dict[tuple[Visibility, torch.device], Tensor] = {}

    def mask(self, visibility: Visibility, device: torch.device) -> Tensor:
        """Which keys each token of the reading may attend to, [T, L + T]."""
        key = visibility, device
        if key not in self._masks:
            self._masks[key] = self._make_mask(visibility).to(device)
        return self._masks[key]

    def _make_mask(self, visibility: Visibility) -> Tensor:
        num_trunk = len(self.trunk)
        positions_T, owners_T = torch.tensor(self.positions), torch.tensor(self._owners)
        at_row = torch.arange(self.kept + num_trunk)
        sees_row = at_row < torch.tensor(self._limits)[:, None]
        own = owners_T[:, None] == owners_T[num_trunk:]
        sees_branch = own & (positions_T[num_trunk:] <= positions_T[:, None])
        seen_TS = torch.cat([sees_row, sees_branch], -1)
        # by position: a branch's keys stand where they would stand in the row
        return seen_TS & visibility.mask(positions_T, torch.cat([at_row, positions_T[num_trunk:]]))

    def begin(self) -> None:
        """Drop the tokens that the row does not keep. Before the pass: one that fails has overwritten their keys."""
        del self.cache.tokens[self.kept :]

    def end(self) -> None:
        """Mark the trunk's tokens as cached."""
        self.cache.tokens += self.trunk


@dataclass(slots=True)
class _ActivePass:
    """The readings of the running pass, what its layers ask for, and how many of its layers have attended."""

    readings: Sequence[Reading]
    layers: Sequence[LayerFacts]
    num_layers: int = 0


_active: ContextVar[_ActivePass] = ContextVar("cage_readings")


@contextmanager
def reading(readings: Sequence[Reading], layers: Sequence[LayerFacts] = ()) -> Iterator[None]:
    """Make these the readings that the model's attention serves, one after another along its tokens.

    Args:
        readings: of different rows, or of one row in order.
        layers: what each attention call of the pass asks for; none: all of them see every key.
    """
    for each in readings:
        each.begin()
    token = _active.set(_ActivePass(readings, layers))
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, of all readings' tokens: query [1, H, T, D] to output [1, T, H, D]."""
    active = _active.get()
    layer = active.num_layers
    active.num_layers += 1
    facts = active.layers[layer] if active.layers else ALL_ALIKE
    terms = AttentionTerms(scaling, facts.visibility, softcap, s_aux)
    outputs = []
    start = 0
    # one call per row: what else is in the pass then cannot change the order in which a row's numbers are added
    for each in active.readings:
        part = slice(start, start + len(each.tokens))
        start = part.stop
        keys, values = each.cache.write(layer, each.kept, key[0, :, part], value[0, :, part])
        outputs.append(_attend(query[0, :, part], keys, values, each, terms))
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


def _attend(query_HTD: Tensor, keys_GSD: Tensor, values_GSD: Tensor, each: Reading, terms: AttentionTerms) -> Tensor:
    """One row: the query heads of a key-value head are its query tokens. Output [H, T, D]."""
    num_heads, num_tokens, width = query_HTD.shape
    visibility = terms.visibility
    sees_all = visibility.first_key(num_tokens - 1) == 0 and (visibility.chunk or num_tokens) >= num_tokens
    if each.is_prefill and terms.is_plain and sees_all:
        return scaled_dot_product_attention(
            query_HTD[None], keys_GSD[None], values_GSD[None], is_causal=True, scale=terms.scale,
            enable_gqa=num_heads != keys_GSD.shape[0],
        )[0]  # fmt: skip
    num_shared = num_heads // keys_GSD.shape[0]
    mask = each.mask(visibility, query_HTD.device)
    if terms.is_plain:
        grouped = query_HTD.reshape(keys_GSD.shape[0], num_shared * num_tokens, width)
        out = scaled_dot_product_attention(
            grouped[None], keys_GSD[None], values_GSD[None], attn_mask=mask.repeat(num_shared, 1), scale=terms.scale
        )[0]
    else:
        by_head = query_HTD.view(keys_GSD.shape[0], num_shared, num_tokens, width)
        out = attend_by_terms(by_head, keys_GSD[:, None], values_GSD[:, None], mask, terms)
    return out.reshape(num_heads, num_tokens, values_GSD.shape[-1])


AttentionInterface.register(ATTENTION, attend)
