"""Attention of new prompts' tokens in a pass of a fixed shape: all of them in one call of torch's FlashAttention.

One call for each part of each prompt takes longer to start than to run, and could not be captured in a CUDA graph. A
part's bits do not depend on what else is in the call. Without a GPU, or for types that the kernel does not support,
there is one call per part.

T tokens of a pass, S segments, H query heads, G key-value heads, D head width, L capacity of a cache row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.attention.plain import AttentionTerms, attend_segment
from pipeline.attention.rows import can_build_for
from pipeline.attention.segments import Segment
from pipeline.attention.transfers import to_device

WIDEST, WIDTH_STEP = 256, 8  # head widths that the kernel supports


def serves(key: Tensor, value: Tensor) -> bool:
    """Whether the kernel supports the type, the head width and the device of these keys and values."""
    width = key.shape[-1]
    is_half = key.dtype in (torch.bfloat16, torch.float16)
    fits = width == value.shape[-1] <= WIDEST and width % WIDTH_STEP == 0
    return is_half and fits and can_build_for(key.device)


class Prompts:
    """The segments of a pass, on the device, in tensors that stay where they are.

    Args:
        num_tokens: T of every pass; padding tokens are written to the spare row.
        most_segments: S at most.
        spare_row: a cache row that is never read.
        device: where the tensors are.
    """

    def __init__(self, num_tokens: int, most_segments: int, *, spare_row: int, device: torch.device) -> None:
        self._spare_row = spare_row
        self._segments: Sequence[Segment] = ()
        # cache row and position of each token
        self._places = torch.zeros(2, num_tokens, dtype=torch.long, device=device)
        # by segment: where its queries begin, which row it is of, and how many keys it has
        self._bounds = torch.zeros(3, most_segments + 1, dtype=torch.int32, device=device)

    @property
    def rows(self) -> Tensor:
        """The cache row of each token, [T]."""
        return self._places[0]

    @property
    def positions(self) -> Tensor:
        """Of each token in its row, [T]."""
        return self._places[1]

    def on(self, device: torch.device) -> Prompts:
        """The same segments, with tensors on another device that are good for one pass."""
        other = copy.copy(self)
        other._places, other._bounds = self._places.to(device), self._bounds.to(device)
        return other

    def load(self, segments: Sequence[Segment]) -> None:
        """Replace the segments. The tensors keep their addresses, which captured CUDA graphs read from."""
        self._segments = segments
        counts = [part.stop - part.start for part in segments]
        missing = self._places.shape[1] - sum(counts)
        rows = [part.row for part in segments for _ in range(part.start, part.stop)]
        positions = [at for part in segments for at in range(part.start, part.stop)]
        places = [[*rows, *([self._spare_row] * missing)], [*positions, *([0] * missing)]]
        self._places.copy_(to_device(places, self._places.device, torch.long), non_blocking=True)
        blank = [0] * (self._bounds.shape[1] - len(segments))
        ends = [0, *accumulate(counts)]
        bounds = [
            [*ends, *([ends[-1]] * (len(blank) - 1))],
            [*(part.row for part in segments), *blank],
            [*(part.stop for part in segments), *blank],
        ]
        self._bounds.copy_(to_device(bounds, self._bounds.device, torch.int32), non_blocking=True)

    def write(self, buffer: Tensor, states_GTD: Tensor) -> None:
        """Write the tokens' keys or values into the cache."""
        rows_T, positions_T = self._places
        buffer[rows_T, :, positions_T] = states_GTD.transpose(0, 1)

    def attend(
        self,
        query_HTD: Tensor,
        keys: Tensor,
        values: Tensor,
        out_THD: Tensor,
        terms: AttentionTerms,
    ) -> None:
        """Attend over the written keys and values, up to each token's own position.

        Args:
            query_HTD: of all tokens.
            keys: of the layer, [rows, G, L, D].
            values: of the layer, likewise.
            out_THD: receives the outputs.
            terms: of the layer.
        """
        window = terms.visibility.window
        if not (serves(keys, values) and terms.is_plain and terms.visibility.chunk is None):
            self._attend_each(query_HTD, keys, values, out_THD, terms)
            return
        # rows of a cache stand [G, L, D]: a token of the first head is L tokens before the same one of the next
        num_rows, num_kv_heads, capacity, width = keys.shape
        shape = (num_rows * num_kv_heads * capacity - (num_kv_heads - 1) * capacity, num_kv_heads, width)
        flat_keys, flat_values = (each.as_strided(shape, (width, capacity * width, 1)) for each in (keys, values))
        query_starts, rows, num_keys = self._bounds
        out_THD[:] = torch.ops.aten._flash_attention_forward(
            query_HTD.transpose(0, 1),
            flat_keys,
            flat_values,
            query_starts,
            rows * (num_kv_heads * capacity),
            len(out_THD),
            capacity,
            0.0,
            True,
            False,
            scale=terms.scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=num_keys[:-1],
        )[0]

    def _attend_each(
        self,
        query_HTD: Tensor,
        keys: Tensor,
        values: Tensor,
        out_THD: Tensor,
        terms: AttentionTerms,
    ) -> None:
        at = 0
        for part in self._segments:
            here = slice(at, at + part.stop - part.start)
            seen = keys[part.row, :, : part.stop], values[part.row, :, : part.stop]
            out_THD[here] = attend_segment(query_HTD[:, here], *seen, terms).transpose(0, 1)
            at = here.stop
        out_THD[at:] = 0
