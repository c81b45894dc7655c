"""One step's games: from log-probabilities at the candidates to one drawn token a row.

B rows, J principals, R roles of a host, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import cage
from pipeline.config import DecodingConfig, RuleName
from pipeline.decoding.draws import draw
from pipeline.decoding.lineup import PrincipalRoles
from pipeline.decoding.running import Terms, TokenOutcome
from pipeline.models.messages import Candidates, HostRole

FLOAT64_CANDIDATES = 1024  # games up to this size are solved in float64, larger ones in float32


def num_candidates(decoding: DecodingConfig) -> int | None:
    """How many of the base's tokens take part; None: all."""
    return None if decoding.candidates == "all" else decoding.candidates


def by_role(roles: Sequence[HostRole], logprobs_BRK: Tensor) -> dict[str, Tensor]:
    """The log-probabilities [B, K] of each role by its name."""
    return {role.name: logprobs_BRK[:, index] for index, role in enumerate(roles)}


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
    terms: Sequence[Terms],
    uniforms: Sequence[float],
) -> list[TokenOutcome]:
    """Solve every row's game over the candidates by the row's rule and draw its token.

    `rewards` holds q [B, K] by principal, `terms` and `uniforms` one a row.
    """
    num_rows, num_candidates = proposal.base_logprobs_BK.shape
    dtype = torch.float64 if num_candidates <= FLOAT64_CANDIDATES else torch.float32
    base_BK = proposal.base_logprobs_BK.to(dtype).log_softmax(-1)
    rewards_BJK = torch.stack([*rewards], 1).to(dtype) if rewards else base_BK.new_zeros(num_rows, 0, num_candidates)
    as_numbers = partial(torch.tensor, dtype=dtype, device=base_BK.device)
    weights_BJ = as_numbers([each.weights for each in terms]).view(num_rows, len(rewards))
    values_BJK = weights_BJ[..., None] * rewards_BJK
    temperatures = [each.agent_temperature for each in terms]
    is_shared = len(set(temperatures)) == 1
    game = cage.Game(base_BK, values_BJK, temperatures[0] if is_shared else as_numbers(temperatures))
    decision = _decide(game, weights_BJ, [each.rule for each in terms])
    drawn_B1 = draw(decision.log_policy, uniforms, temperature=decoding.temperature, top_p=decoding.top_p)[:, None]
    at_BJ1 = drawn_B1[:, None].expand(-1, len(rewards), 1)
    payments: Sequence[Sequence[float] | None] = [None] * num_rows
    thresholds = payments
    if decision.thresholds is not None:
        paid_BJ = (values_BJK.gather(-1, at_BJ1)[..., 0] - decision.thresholds).clamp(min=0)
        payments, thresholds = (_where_paid(numbers_BJ, terms) for numbers_BJ in (paid_BJ, decision.thresholds))
    ids_BK = proposal.ids_BK
    columns = zip(
        (drawn_B1 if ids_BK is None else ids_BK.gather(-1, drawn_B1))[:, 0].tolist(),
        rewards_BJK.gather(-1, at_BJ1)[..., 0].tolist(),
        payments,
        thresholds,
        proposal.base_logprobs_BK.gather(-1, drawn_B1)[:, 0].tolist(),
        decision.log_policy.gather(-1, drawn_B1)[:, 0].tolist(),
        _kl(decision.log_policy, base_BK).tolist(),
        proposal.covered_mass_B.tolist(),
        decision.residual.tolist(),
        decision.status.tolist(),
        decision.num_steps.tolist(),
        strict=True,
    )
    return [TokenOutcome(*column) for column in columns]


def _where_paid(numbers_BJ: Tensor, terms: Sequence[Terms]) -> list[list[float] | None]:
    """The numbers of the rows whose rule has payments; None for the others."""
    rows = zip(numbers_BJ.tolist(), terms, strict=True)
    return [numbers if each.rule is RuleName.EQUILIBRIUM else None for numbers, each in rows]


def _decide(game: cage.Game, weights_BJ: Tensor, rules: Sequence[RuleName]) -> cage.rules.Decision:
    """Let every row's rule decide it; thresholds are NaN in the rows whose rule has none."""
    if len(set(rules)) == 1:
        return cage.rules.by_name[rules[0].value](game, weights_BJ)
    decision = cage.rules.Decision(
        log_policy=torch.empty_like(game.base_logprobs),
        thresholds=torch.full_like(weights_BJ, torch.nan),
        residual=torch.empty_like(game.base_logprobs[:, 0]),
        status=torch.empty_like(game.base_logprobs[:, 0], dtype=torch.int64),
        num_steps=torch.empty_like(game.base_logprobs[:, 0], dtype=torch.int32),
    )
    for rule in dict.fromkeys(rules):
        at_R = torch.tensor([row for row, other in enumerate(rules) if other is rule], device=weights_BJ.device)
        part = cage.rules.by_name[rule.value](
            cage.Game(game.base_logprobs[at_R], game.values[at_R], game.row_temperatures[at_R]), weights_BJ[at_R]
        )
        for name in ("log_policy", "thresholds", "residual", "status", "num_steps"):
            if getattr(part, name) is not None:
                getattr(decision, name)[at_R] = getattr(part, name).to(getattr(decision, name).dtype)
    return decision


def _kl(log_policy_BK: Tensor, base_BK: Tensor) -> Tensor:
    """KL(policy || base) [B] in nats over the candidates; rounding below 0 is cut."""
    policy_BK = log_policy_BK.exp()
    return torch.where(policy_BK > 0, policy_BK * (log_policy_BK - base_BK), 0.0).sum(-1).clamp(min=0)
