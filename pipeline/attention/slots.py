"""The slot cache: keys and values of many running rows, each at its own positions, and attention over them.

A cache row belongs to one (slot, role). A forward pass takes any tokens of any rows, packed one after another: parts
of new prompts, then one token of each running row. Each key is written at its row's own position and a row attends
over its own length: nothing is padded to the left, nothing is shared.

R running rows of a pass, T packed tokens, H query heads, G key-value heads, D head width, L capacity of a cache row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from pipeline.attention import rows as row_attention
from pipeline.attention.plain import AttentionTerms, attend_batch, attend_each_row, attend_segment
from pipeline.attention.prompt_segments import Prompts
from pipeline.attention.segments import Copied, RunningRows, Segment
from pipeline.attention.transfers import to_device
from pipeline.attention.visibility import ALL_ALIKE, LayerFacts
from pipeline.protocol.capacity import capacity_for

ATTENTION = "cage_slots"


@dataclass(frozen=True, slots=True)
class SlotPass:
    """One forward pass: the tokens of the segments, then one token of each running row.

    Args:
        cache: where keys and values are kept; without one there are only segments from the start of a text.
        segments: parts of prompts, in the order of their tokens.
        prefix_copies: parts that rows copy from others once they are written.
        running: the rows that append a token.
        per_row: attend row by row over exact lengths, so that no row's bits depend on the batch composition;
            otherwise one masked call serves all running rows.
        prompts: instead of segments, in a pass of a fixed shape over new prompts.
        layers: what each attention call of the pass asks for, in order; none: all of them see every key.
    """

    cache: SlotCache | None
    segments: Sequence[Segment]
    prefix_copies: Sequence[Copied]
    running: RunningRows
    per_row: bool
    prompts: Prompts | None = None
    layers: Sequence[LayerFacts] = ()

    @property
    def longest(self) -> int:
        """Tokens of its longest row after the pass."""
        return max([*self.running.lengths, *(part.stop for part in self.segments)], default=0)

    def on(self, device: torch.device) -> SlotPass:
        """The same pass as a layer on another device needs it."""
        prompts = None if self.prompts is None else self.prompts.on(device)
        return replace(self, running=self.running.on(device), prompts=prompts)

    def token_rows(self, device: torch.device) -> Tensor:
        """The cache row of every token, [T]."""
        if self.prompts is not None:
            return self.prompts.rows
        if not self.segments:
            return self.running.rows_R
        rows = [part.row for part in self.segments for _ in range(part.start, part.stop)]
        return torch.cat([to_device(rows, device, torch.long), self.running.rows_R])


@dataclass(slots=True)
class _ActivePass:
    """The running pass, and how many of its layers have attended.

    Args:
        slot_pass: with its tensors on the model's first device.
        num_layers: that have attended.
        by_device: the pass on other devices that have layers of the model.
    """

    slot_pass: SlotPass
    num_layers: int = 0
    by_device: dict[torch.device, SlotPass] = field(default_factory=dict)

    def on(self, device: torch.device) -> SlotPass:
        """The pass on a layer's device."""
        if device == self.slot_pass.running.rows_R.device:
            return self.slot_pass
        if device not in self.by_device:
            self.by_device[device] = self.slot_pass.on(device)
        return self.by_device[device]


_active: ContextVar[_ActivePass] = ContextVar("cage_slot_pass")


@contextmanager
def serving(slot_pass: SlotPass) -> Iterator[None]:
    """Make `slot_pass` the one that the model's attention serves."""
    token = _active.set(_ActivePass(slot_pass))
    try:
        yield
    finally:
        _active.reset(token)


class SlotCache:
    """Keys and values by layer, each [rows, G, L, D]; L grows as rows get longer.

    Each layer's are on the device of the layer.

    Args:
        num_rows: cache rows, one per slot and role.

    Attributes:
        num_moves: how often a buffer was allocated; graphs captured before the last time read freed memory.
        keys: by layer; empty before the first pass.
        values: by layer; empty before the first pass.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.num_moves = 0  # how often a buffer was allocated or grown
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def capacity(self) -> int:
        """The number of tokens that fit into a row; 0 before the first pass."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def hold(self, layer: int, key_GTD: Tensor, value_GTD: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, large enough for rows of `num_tokens`; the first pass allocates them."""
        if layer == len(self.keys):
            for buffers, states in ((self.keys, key_GTD), (self.values, value_GTD)):
                buffers.append(
                    states.new_zeros(self.num_rows, states.shape[0], capacity_for(num_tokens), states.shape[2])
                )
            self.num_moves += 1
        self._reserve(layer, num_tokens)
        return self.keys[layer], self.values[layer]

    def reserve(self, num_tokens: int) -> None:
        """Make the buffers of every layer large enough for rows of `num_tokens`."""
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

    def bytes_per_token(self) -> Counter[torch.device]:
        """Bytes that one token of one row takes over all layers, by device; none before the first pass."""
        found: Counter[torch.device] = Counter()
        for buffer in (*self.keys, *self.values):
            found[buffer.device] += buffer.element_size() * buffer.shape[1] * buffer.shape[3]
        return found


def _with_capacity(buffer: Tensor, num_tokens: int) -> Tensor:
    grown = buffer.new_zeros(*buffer.shape[:2], capacity_for(num_tokens), buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, over packed tokens: query [1, H, T, D] to output [1, T, H, D].

    In models that keep states a pass has a dimension for its running rows: query [R, H, 1, D] to [R, 1, H, D].
    Keys and values are kept in the running pass's cache. What a query may see comes from what was learned of the
    model's masks, not from a keyword: some families have a window in their mask alone.
    """
    if query.shape[0] > 1:
        query, key, value = (each.transpose(0, 2) for each in (query, key, value))
        return _attend(query, key, value, scaling, softcap, s_aux).transpose(0, 1), None
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.cage.attend(query, key, value, scaling, softcap, s_aux)
        return out, None
    return _attend(query, key, value, scaling, softcap, s_aux), None


# One operation that a compiler does not look into: what it needs to know of the pass is no tensor. It does not name
# its layer, so that one compilation serves all layers; they come in order.
torch.library.define(
    "cage::attend",
    "(Tensor query, Tensor key, Tensor value, float? scaling, float? softcap, Tensor? sinks) -> Tensor",
)


@torch.library.register_fake("cage::attend")  # type: ignore[untyped-decorator]
def _(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    active = _active.get()
    slot_pass, layer = active.on(query.device), active.num_layers
    active.num_layers += 1
    facts = slot_pass.layers[layer] if slot_pass.layers else ALL_ALIKE
    terms = AttentionTerms(scaling, facts.visibility, softcap, sinks)
    query_HTD, key_GTD, value_GTD = query[0], key[0], value[0]
    num_heads, num_tokens, _ = query_HTD.shape
    out_THD = query.new_empty(num_tokens, num_heads, value.shape[-1])
    num_new = num_tokens - len(slot_pass.running.lengths)
    keys = values = None
    if slot_pass.cache is not None:
        keys, values = slot_pass.cache.hold(layer, key_GTD, value_GTD, slot_pass.longest)
    if (prompts := slot_pass.prompts) is not None:
        assert keys is not None
        assert values is not None
        prompts.write(keys, key_GTD)
        prompts.write(values, value_GTD)
        prompts.attend(query_HTD, keys, values, out_THD, terms)
    else:
        if keys is not None and values is not None:
            _write(keys, key_GTD, slot_pass)
            _write(values, value_GTD, slot_pass)
            # also where nothing was written: the row that others copy from may have held its whole prompt before
            _copy_prefixes(keys, values, slot_pass.prefix_copies)
        _attend_segments(query_HTD, key_GTD, value_GTD, keys, values, slot_pass, out_THD, terms)
    if slot_pass.running.lengths:
        assert keys is not None
        assert values is not None
        _attend_rows(
            query_HTD[:, num_new:], key_GTD[:, num_new:], value_GTD[:, num_new:], keys, values, slot_pass,
            out_THD[num_new:], terms,
        )  # fmt: skip
    return out_THD[None]


torch.library.impl("cage::attend", ["CPU", "CUDA"], _attend)


def _write(buffer: Tensor, states_GTD: Tensor, slot_pass: SlotPass) -> None:
    """Put what segments say at their rows' positions."""
    at = 0
    for part in slot_pass.segments:
        count = part.stop - part.start
        buffer[part.row, :, part.start : part.stop] = states_GTD[:, at : at + count]
        at += count


def _copy_prefixes(keys: Tensor, values: Tensor, copies: Sequence[Copied]) -> None:
    """Copy prefixes from rows that were written just now."""
    for copied in copies:
        _copy(keys, copied)
        _copy(values, copied)


def _attend_segments(
    query_HTD: Tensor,
    key_GTD: Tensor,
    value_GTD: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    slot_pass: SlotPass,
    out_THD: Tensor,
    terms: AttentionTerms,
) -> None:
    """One call a segment."""
    at = 0
    for part in slot_pass.segments:
        here = slice(at, at + part.stop - part.start)
        if part.start == 0:
            seen = key_GTD[:, here], value_GTD[:, here]
        else:
            assert keys is not None
            assert values is not None
            seen = keys[part.row, :, : part.stop], values[part.row, :, : part.stop]
        out_THD[here] = attend_segment(query_HTD[:, here], *seen, terms).transpose(0, 1)
        at = here.stop


def _attend_rows(
    query_HRD: Tensor,
    key_GRD: Tensor,
    value_GRD: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_pass: SlotPass,
    out_RHD: Tensor,
    terms: AttentionTerms,
) -> None:
    """Write and attend for one token a running row."""
    running = slot_pass.running
    rows_R, last_R = running.rows_R, running.last_R
    if row_attention.serves(keys, values):
        if running.may_follow:  # programs run in any order: what a row reads of others has to be there before
            row_attention.store_rows(key_GRD, value_GRD, keys, values, rows_R, last_R)
        row_attention.attend_rows(query_HRD, key_GRD, value_GRD, keys, values, rows_R, last_R, out_RHD, terms)
        return
    keys[rows_R, :, last_R] = key_GRD.transpose(0, 1)
    values[rows_R, :, last_R] = value_GRD.transpose(0, 1)
    attend_rows = attend_each_row if slot_pass.per_row else attend_batch
    query_RH1D = query_HRD.transpose(0, 1)[:, :, None]
    out_RHD[:] = attend_rows(query_RH1D, keys, values, running, terms)[:, :, 0]


AttentionInterface.register(ATTENTION, attend)
