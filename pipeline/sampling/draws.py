"""From a policy to one token: temperature, nucleus, and one counter-based uniform draw.

The draw of a token depends on (seed, row id, sample, step) alone: not on the batch, the slot or a restart.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


class Uniforms:
    """The uniform draws of one answer, in [0, 1).

    A counter-based generator: the draw of a step is a hash of the key and the step, so that there is no state to
    lose, and a row that begins again draws the same tokens.

    Args:
        seed: of the run.
        row_id: of the row.
        sample: which of the row's answers it is.
    """

    __slots__ = ("_key",)

    def __init__(self, seed: int, row_id: str, sample: int) -> None:
        identity = f"{seed}\x1f{sample}\x1f{row_id}".encode("utf-8", "surrogatepass")
        self._key = blake2b(identity, digest_size=32, person=b"cage-draws").digest()

    def at(self, step: int) -> float:
        """The draw of a step: the upper 53 bits of a hash, as many as a float64 holds exactly."""
        digest = blake2b(step.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(log_policy_BK: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Index [B] of the token that each row draws: the inverse of its cumulative distribution at its uniform number.

    Args:
        log_policy_BK: of the policies, in nats.
        uniforms_B: in [0, 1), float64.
        temperature: of the draw; 0 takes the likeliest token, the first one of equals.
        top_p: draws from the fewest tokens with so much of the policy's mass.
    """
    if temperature == 0:
        return log_policy_BK.argmax(-1)
    # in float64: a uniform number has 53 bits, and a sum over the vocabulary in float32 would not reach 1
    probs_BK = (log_policy_BK.double() / temperature).softmax(-1)
    if top_p < 1:
        probs_BK = _nucleus(probs_BK, top_p)
    cumulative_BK = probs_BK.cumsum(-1)
    drawn_B = (cumulative_BK <= uniforms_B[:, None] * cumulative_BK[:, -1:]).sum(-1)
    # rounding at the upper end must not draw a token of probability zero
    last_B = (probs_BK > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(drawn_B, last_B)


def _nucleus(probs_BK: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens whose mass reaches top_p."""
    sorted_BK, order_BK = probs_BK.sort(dim=-1, descending=True, stable=True)
    before_BK = sorted_BK.cumsum(-1) - sorted_BK
    kept_BK = torch.where(before_BK < top_p, sorted_BK, torch.zeros_like(sorted_BK))
    return torch.zeros_like(probs_BK).scatter(-1, order_BK, kept_BK)
