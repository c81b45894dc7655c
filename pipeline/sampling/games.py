"""One step's games: from log-probabilities at the candidates to one drawn token a row.

B rows, J principals, R roles of a host, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

import cage
from pipeline.config.sections import DecodingConfig, RuleName
from pipeline.engine.row_state import Terms, TokenOutcome
from pipeline.protocol.messages import Candidates, HostRole
from pipeline.runtime.topology import PrincipalPlan
from pipeline.sampling.draws import draw

FLOAT64_CANDIDATES = 1024  # games up to this size are solved in float64, larger ones in float32


def num_candidates(decoding: DecodingConfig) -> int | None:
    """How many of the base's tokens take part; None: all."""
    return None if decoding.candidates == "all" else decoding.candidates


def by_role(roles: Sequence[HostRole], logprobs_BRK: Tensor) -> dict[str, Tensor]:
    """The log-probabilities [B, K] of each role by its name."""
    return {role.name: logprobs_BRK[:, index] for index, role in enumerate(roles)}


def token_rewards(principals: Sequence[PrincipalPlan], logprobs: Mapping[str, Tensor]) -> list[Tensor]:
    """Each principal's q in nats, in float64, from its roles' log-probabilities (of any one shape)."""
    rewards = []
    for principal in principals:
        reward = logprobs[principal.tuned].double()
        if principal.reference is not None:
            reward = reward - logprobs[principal.reference].double()
        rewards.append(reward)
    return rewards


@dataclass(frozen=True, slots=True)
class Played:
    """What a step gave each row, where it was computed; `numbers_BC` holds it in columns.

    The columns: token id, base and final log-probability, KL, covered mass, residual, status, steps, then for every
    principal its reward, its payment and its threshold. float64 holds each of them exactly.
    """

    numbers_BC: Tensor

    STATUS: ClassVar[int] = 6
    NUM_STEPS: ClassVar[int] = 7
    NUM_ALONE: ClassVar[int] = 8

    @property
    def token_ids(self) -> Tensor:
        """The drawn tokens, [B]."""
        return self.numbers_BC[:, 0].long()

    def outcomes(self, terms: Sequence[Terms]) -> list[TokenOutcome]:
        """The same for each row; waits for a GPU. Rules other than the equilibrium pay nothing."""
        outcomes = []
        for row, each in zip(self.numbers_BC.tolist(), terms, strict=True):
            token, base, final, kl, covered, residual, status, num_steps = row[: self.NUM_ALONE]
            by_principal = row[self.NUM_ALONE :]
            count = len(by_principal) // 3
            pays = each.rule is RuleName.EQUILIBRIUM
            outcomes.append(
                TokenOutcome(
                    token_id=int(token),
                    rewards=by_principal[:count],
                    payments=by_principal[count : 2 * count] if pays else None,
                    thresholds=by_principal[2 * count :] if pays else None,
                    base_logprob=base,
                    logprob=final,
                    kl=kl,
                    covered_mass=covered,
                    residual=residual,
                    status=int(status),
                    num_steps=int(num_steps),
                )
            )
        return outcomes


def play(
    decoding: DecodingConfig,
    proposal: Candidates,
    rewards: Sequence[Tensor],
    terms: Sequence[Terms],
    uniforms: Sequence[float],
) -> Played:
    """Solve every row's game over the candidates by the row's rule and draw its token.

    `rewards` holds q [B, K] by principal, `terms` and `uniforms` one a row.
    """
    if proposal.base_logprobs_BK.shape[1] <= FLOAT64_CANDIDATES:
        # a CPU is done with so few numbers before a GPU has begun with its many small steps
        proposal, rewards = proposal.cpu(), [reward.cpu() for reward in rewards]
    device = proposal.base_logprobs_BK.device
    rules = [each.rule for each in terms]
    temperatures = [each.agent_temperature for each in terms]
    is_shared = len(set(temperatures)) == 1
    base_BK, rewards_BJK = as_game(proposal, rewards)
    as_numbers = partial(torch.tensor, dtype=base_BK.dtype, device=device)
    weights_BJ = as_numbers([each.weights for each in terms]).view(len(terms), len(rewards))
    values_BJK = weights_BJ[..., None] * rewards_BJK
    game = cage.Game(base_BK, values_BJK, temperatures[0] if is_shared else as_numbers(temperatures))
    decision = _decide(game, weights_BJ, rules)
    uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=device)
    return drawn(decoding, proposal, game, rewards_BJK, decision, uniforms_B)


def as_game(proposal: Candidates, rewards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The base's log-probabilities [B, K] over the candidates and the rewards [B, J, K], in the type of the game."""
    num_rows, num_candidates = proposal.base_logprobs_BK.shape
    dtype = torch.float64 if num_candidates <= FLOAT64_CANDIDATES else torch.float32
    base_BK = proposal.base_logprobs_BK.to(dtype).log_softmax(-1)
    if not rewards:
        return base_BK, base_BK.new_zeros(num_rows, 0, num_candidates)
    return base_BK, torch.stack([*rewards], 1).to(dtype)


def drawn(
    decoding: DecodingConfig,
    proposal: Candidates,
    game: cage.Game,
    rewards_BJK: Tensor,
    decision: cage.rules.Decision,
    uniforms_B: Tensor,
) -> Played:
    """Draw a token of each row's policy, and say what it cost. Asks the device nothing."""
    log_policy_BK, base_BK = decision.log_policy, game.base_logprobs
    drawn_B1 = draw(log_policy_BK, uniforms_B, temperature=decoding.temperature, top_p=decoding.top_p)[:, None]
    at_BJ1 = drawn_B1[:, None].expand(-1, game.num_principals, 1)
    thresholds_BJ = decision.thresholds
    if thresholds_BJ is None:
        thresholds_BJ = torch.full_like(game.values[..., 0], torch.nan)
    paid_BJ = (game.values.gather(-1, at_BJ1)[..., 0] - thresholds_BJ).clamp(min=0)
    ids_BK = proposal.ids_BK
    columns = [
        (drawn_B1 if ids_BK is None else ids_BK.gather(-1, drawn_B1))[:, 0],
        proposal.base_logprobs_BK.gather(-1, drawn_B1)[:, 0],
        log_policy_BK.gather(-1, drawn_B1)[:, 0],
        _kl(log_policy_BK, base_BK),
        proposal.covered_mass_B,
        decision.residual,
        decision.status,
        decision.num_steps,
        *rewards_BJK.gather(-1, at_BJ1)[..., 0].unbind(1),
        *paid_BJ.unbind(1),
        *thresholds_BJ.unbind(1),
    ]
    return Played(torch.stack([column.double() for column in columns], 1))


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
