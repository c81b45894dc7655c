"""One step's games: from log-probabilities at the candidates to one drawn token a row.

B rows, J principals, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import cage
from pipeline.config import DecodingConfig
from pipeline.decoding.draws import draw
from pipeline.decoding.lineup import PrincipalRoles
from pipeline.decoding.running import TokenOutcome
from pipeline.models.messages import Candidates

FLOAT64_CANDIDATES = 1024  # games up to this size are solved in float64, larger ones in float32


def token_rewards(principals: Sequence[PrincipalRoles], logprobs: Mapping[str, Tensor]) -> list[Tensor]:
    """Each principal's q in nats, in float64, from its roles' log-probabilities (of any one shape)."""
    rewards = []
    for principal in principals:
        reward = logprobs[principal.tuned].double()
        if principal.reference is not None:
            reward = reward - logprobs[principal.reference].double()
        rewards.append(reward)
    return rewards


def play(
    decoding: DecodingConfig,
    proposal: Candidates,
    rewards: Sequence[Tensor],
    weights: Sequence[Sequence[float]],
    uniforms: Sequence[float],
) -> list[TokenOutcome]:
    """Solve every row's game over the candidates by the configured rule and draw its token.

    `rewards` holds q [B, K] by principal, `weights` [B][J], `uniforms` one draw a row.
    """
    num_rows, num_candidates = proposal.base_logprobs_BK.shape
    dtype = torch.float64 if num_candidates <= FLOAT64_CANDIDATES else torch.float32
    base_BK = proposal.base_logprobs_BK.to(dtype).log_softmax(-1)
    rewards_BJK = torch.stack([*rewards], 1).to(dtype) if rewards else base_BK.new_zeros(num_rows, 0, num_candidates)
    weights_BJ = torch.tensor(weights, dtype=dtype, device=base_BK.device).view(num_rows, len(rewards))
    values_BJK = weights_BJ[..., None] * rewards_BJK
    game = cage.Game(base_BK, values_BJK, decoding.agent_temperature)
    decision = cage.rules.by_name[decoding.rule.value](game, weights_BJ)
    drawn_B1 = draw(decision.log_policy, uniforms, temperature=decoding.temperature, top_p=decoding.top_p)[:, None]
    at_BJ1 = drawn_B1[:, None].expand(-1, len(rewards), 1)
    payments: Sequence[Sequence[float] | None] = [None] * num_rows
    if decision.thresholds is not None:
        payments = (values_BJK.gather(-1, at_BJ1)[..., 0] - decision.thresholds).clamp(min=0).tolist()
    ids_BK = proposal.ids_BK
    columns = zip(
        (drawn_B1 if ids_BK is None else ids_BK.gather(-1, drawn_B1))[:, 0].tolist(),
        rewards_BJK.gather(-1, at_BJ1)[..., 0].tolist(),
        payments,
        proposal.base_logprobs_BK.gather(-1, drawn_B1)[:, 0].tolist(),
        decision.log_policy.gather(-1, drawn_B1)[:, 0].tolist(),
        _kl(decision.log_policy, base_BK).tolist(),
        proposal.covered_mass_B.tolist(),
        decision.residual.tolist(),
        decision.status.tolist(),
        strict=True,
    )
    return [TokenOutcome(*column) for column in columns]


def _kl(log_policy_BK: Tensor, base_BK: Tensor) -> Tensor:
    """KL(policy || base) [B] in nats over the candidates; rounding below 0 is cut."""
    policy_BK = log_policy_BK.exp()
    return torch.where(policy_BK > 0, policy_BK * (log_policy_BK - base_BK), 0.0).sum(-1).clamp(min=0)
