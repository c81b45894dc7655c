"""Propose: which tokens take part in a step's game.

B rows, R roles of a host, K candidates, V vocabulary.
"""

from __future__ import annotations

import math

from torch import Tensor

from pipeline.protocol.messages import Candidates


def propose_from(logits_BRV: Tensor, vocab_size: int, *, num_candidates: int | None, min_p: float) -> Candidates:
    """The candidates of the first role, the likeliest first, with the values of every role at them.

    Does not wait for the device, so that it can be captured in a CUDA graph.

    Args:
        logits_BRV: newest logits; padding behind the vocabulary is -inf.
        vocab_size: number of token ids.
        num_candidates: K; None proposes the whole vocabulary, in its own order.
        min_p: candidates less likely than `min_p` times the likeliest one get a base log-probability of -inf.
    """
    normaliser_BR1 = logits_BRV.logsumexp(-1, keepdim=True)
    logits_BRV = logits_BRV[..., :vocab_size]
    if num_candidates is None or num_candidates >= vocab_size:
        ids_BK = None
        role_logprobs_BRK = logits_BRV - normaliser_BR1
    else:
        ids_BK = logits_BRV[:, 0].topk(num_candidates, dim=-1).indices
        role_logprobs_BRK = at_candidates(logits_BRV, ids_BK) - normaliser_BR1
    base_BK = role_logprobs_BRK[:, 0].clone()
    if min_p > 0:
        floor_B1 = base_BK.max(-1, keepdim=True).values + math.log(min_p)
        base_BK = base_BK.masked_fill(base_BK < floor_B1, -math.inf)
    return Candidates(ids_BK, base_BK, base_BK.exp().sum(-1), role_logprobs_BRK)


def at_candidates(logits_BRV: Tensor, ids_BK: Tensor) -> Tensor:
    """The logits [B, R, K] of every role at the candidates."""
    shape = (*logits_BRV.shape[:2], ids_BK.shape[1])
    return logits_BRV.gather(-1, ids_BK[:, None, :].expand(shape))
