"""Attention by torch's own kernels: one call per part of a prompt, per row, or per batch.

R running rows of a pass, T packed tokens, H query heads, G key-value heads, D head width, L tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.attention.segments import RunningRows
from pipeline.attention.visibility import ALL_KEYS, Visibility


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """What one layer's attention computes, beside its inputs.

    Args:
        scale: of the products of queries and keys; None: 1 / sqrt(D).
        visibility: which keys a query sees.
        softcap: scores s become softcap * tanh(s / softcap).
        sinks: a score per query head [H] that takes part in every softmax and has no value.
    """

    scale: float | None = None
    visibility: Visibility = ALL_KEYS
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention computes its scores."""
        return self.softcap is None and self.sinks is None


def attend_segment(query: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms) -> Tensor:
    """Query [H, T, D] of the last T of all tokens whose keys [G, L, D] are given; causal. Output [H, T, D]."""
    num_tokens, length = query.shape[1], keys.shape[1]
    visibility, mask = terms.visibility, None
    is_cut = visibility.first_key(length - 1) > 0 or (visibility.chunk or length) < length
    if num_tokens < length or is_cut or not terms.is_plain:
        at_L = torch.arange(length, device=query.device)
        mask = visibility.mask(at_L[length - num_tokens :], at_L)
    if terms.is_plain:
        return scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=terms.scale,
            enable_gqa=query.shape[0] != keys.shape[0],
        )[0]  # fmt: skip
    grouped = query.view(keys.shape[0], -1, *query.shape[1:])
    out = attend_by_terms(grouped, keys[:, None], values[:, None], mask, terms)
    return out.reshape(query.shape[0], num_tokens, values.shape[-1])


def attend_each_row(
    query: Tensor, keys: Tensor, values: Tensor, running: RunningRows, terms: AttentionTerms
) -> Tensor:
    """One call per row over its own length: the query heads of a key-value head are its query tokens.

    So a row's bits depend on nothing but the row. Every call costs as much as its arithmetic on a small model: what
    can be cut into rows is cut at once.
    """
    num_rows, num_heads, _, width = query.shape
    num_kv_heads = keys.shape[1]
    queries = query.reshape(num_rows, 1, num_kv_heads, num_heads // num_kv_heads, width).unbind(0)
    key_rows, value_rows = keys[:, None].unbind(0), values[:, None].unbind(0)
    out = []
    for query_row, row, length in zip(queries, running.rows, running.lengths, strict=True):
        start = terms.visibility.first_key(length - 1)
        seen_keys = key_rows[row].narrow(2, start, length - start)
        seen_values = value_rows[row].narrow(2, start, length - start)
        if terms.is_plain:
            out.append(scaled_dot_product_attention(query_row, seen_keys, seen_values, scale=terms.scale))
        else:
            by_head = attend_by_terms(
                query_row[0, :, :, None], seen_keys[0, :, None], seen_values[0, :, None], None, terms
            )
            out.append(by_head[None, :, :, 0])
    return torch.cat(out).view(num_rows, num_heads, 1, -1)


def attend_batch(query: Tensor, keys: Tensor, values: Tensor, running: RunningRows, terms: AttentionTerms) -> Tensor:
    """One masked call over the longest live length."""
    longest = max(running.lengths)
    at_L = torch.arange(longest, device=query.device)
    mask_RL = terms.visibility.mask(running.last_R, at_L)
    num_rows, num_heads, _, width = query.shape
    num_kv_heads = keys.shape[1]
    grouped = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, width)
    seen_keys, seen_values = (each[:, :, :longest].index_select(0, running.rows_R) for each in (keys, values))
    if terms.is_plain:
        out = scaled_dot_product_attention(
            grouped, seen_keys, seen_values, attn_mask=mask_RL[:, None, None, :], scale=terms.scale
        )
    else:
        mask = mask_RL[:, None, None, None, :]
        out = attend_by_terms(grouped[:, :, :, None], seen_keys[:, :, None], seen_values[:, :, None], mask, terms)
    return out.reshape(num_rows, num_heads, 1, -1)


def attend_by_terms(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, terms: AttentionTerms
) -> Tensor:
    """Softmax attention with a softcap or sinks: query [..., G, S, T, D], keys and values [..., G, 1, L, D].

    Scores are in float32 whatever the type, as transformers' own code has them.
    """
    scale = query.shape[-1] ** -0.5 if terms.scale is None else terms.scale
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if terms.softcap is not None:
        scores = torch.tanh(scores / terms.softcap) * terms.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if terms.sinks is not None:
        shape = (query.shape[-4], query.shape[-3], 1, 1)
        sinks = terms.sinks.float().view(shape).expand(*scores.shape[:-1], 1)
        # a sink takes its share of the softmax and nothing else
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(values.dtype) @ values
