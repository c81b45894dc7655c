"""Attention by torch's own kernels, one call a prompt's part, a row or a batch.

R running rows of a pass, T packed tokens, H query heads, G key-value heads, D head width, L tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.attention.segments import RunningRows


def attend_segment(query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Query [H, T, D] of the last T of all tokens whose keys [G, L, D] are given; causal."""
    num_tokens, length = query.shape[1], keys.shape[1]
    mask = None
    if num_tokens < length or (window is not None and window < length):
        at = torch.arange(length, device=query.device)
        distance = at[length - num_tokens :, None] - at[None, :]
        mask = (distance >= 0) & (distance < (length if window is None else window))
    return scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=query.shape[0] != keys.shape[0],
    )[0]  # fmt: skip


def attend_each_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    running: RunningRows,
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
    for query_row, row, length in zip(queries, running.rows, running.lengths, strict=True):
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


def attend_batch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    running: RunningRows,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One masked call over the longest live length."""
    longest = max(running.lengths)
    lengths_R1 = running.last_R[:, None] + 1
    at_L = torch.arange(longest, device=query.device)[None, :]
    mask_RL = at_L < lengths_R1
    if window is not None:
        mask_RL &= at_L >= lengths_R1 - window
    num_rows, num_heads, _, width = query.shape
    num_kv_heads = keys.shape[1]
    out = scaled_dot_product_attention(
        query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, width),
        keys[:, :, :longest].index_select(0, running.rows_R),
        values[:, :, :longest].index_select(0, running.rows_R),
        attn_mask=mask_RL[:, None, None, :],
        scale=scaling,
    )
    return out.reshape(num_rows, num_heads, 1, -1)
