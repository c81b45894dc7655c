"""Value, solve, draw: from the outputs of all roles at the candidates to one drawn token per row.

The same functions serve the coordinator, a lone host, a captured CUDA graph and the logits processor.

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
from cage.rule_names import RuleName
from pipeline.protocol.messages import Candidates, Terms, TokenOutcome
from pipeline.protocol.specs import SamplingOptions
from pipeline.protocol.topology import HostRole, PrincipalPlan
from pipeline.sampling.draws import draw

# Games up to this size are solved in float64: over some hundred tokens it costs little, and the tails of log-ratios
# need the digits. Larger ones, whole vocabularies, are solved in float32.
FLOAT64_CANDIDATES = 1024


def by_role(roles: Sequence[HostRole], outputs_BRK: Tensor) -> dict[str, Tensor]:
    """The outputs [B, K] of each role by its name."""
    return {role.name: outputs_BRK[:, index] for index, role in enumerate(roles)}


def token_rewards(principals: Sequence[PrincipalPlan], outputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Value: each principal's q in nats, in float64, from the outputs of its roles (of any one shape).

    0 for principals without roles, which value no tokens.
    """
    return [
        principal.section.rewards({part: outputs[role] for part, role in principal.roles.items()})
        if principal.roles
        else torch.zeros_like(next(iter(outputs.values())), dtype=torch.float64)
        for principal in principals
    ]


def reward_at_weights(principals: Sequence[PrincipalPlan], outputs: Mapping[str, Tensor]) -> Tensor | None:
    """The q of the one reward model that all principals share at the row's weights, in nats and float64.

    None where no rule of the run asks for it.
    """
    found = next((each for each in principals if each.roles_at_weights), None)
    if found is None:
        return None
    return found.section.rewards({part: outputs[role] for part, role in found.roles_at_weights.items()})


@dataclass(frozen=True, slots=True)
class SampledStep:
    """What a step gave each row, on the device that computed it; one tensor, so that one copy brings it to the CPU.

    Args:
        numbers_BC: the columns token id, base and final log-probability, KL, covered mass, residual, status, steps;
            then the rewards of all principals, their payments, their thresholds. float64 holds each of them exactly.
    """

    numbers_BC: Tensor

    STATUS: ClassVar[int] = 6
    NUM_STEPS: ClassVar[int] = 7
    NUM_COMMON: ClassVar[int] = 8  # columns before those by principal

    @property
    def token_ids(self) -> Tensor:
        """The drawn tokens, [B]."""
        return self.numbers_BC[:, 0].long()

    def outcomes(self, terms: Sequence[Terms]) -> list[TokenOutcome]:
        """The outcome of each row; waits for a GPU. Payments and thresholds are None for rules that do not pay."""
        outcomes = []
        for row, each in zip(self.numbers_BC.tolist(), terms, strict=True):
            token, base, final, kl, covered, residual, status, num_steps = row[: self.NUM_COMMON]
            by_principal = row[self.NUM_COMMON :]
            count = len(by_principal) // 3
            pays = each.rule.pays
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


@dataclass(frozen=True, slots=True)
class SolvedStep:
    """The games of a step and what their rules decided.

    Args:
        game: base and values over the candidates, in the dtype of `as_game`.
        rewards_BJK: q by principal, before weights.
        decision: policy, thresholds and how the solve ended.
    """

    game: cage.Game
    rewards_BJK: Tensor
    decision: cage.rules.Decision


def solve_and_sample(
    options: SamplingOptions,
    proposal: Candidates,
    rewards: Sequence[Tensor],
    terms: Sequence[Terms],
    uniforms: Sequence[float],
    at_weights: Tensor | None = None,
) -> SampledStep:
    """Solve every row's game by the row's rule and draw its token.

    Args:
        options: temperature and nucleus of the draw.
        proposal: the base's candidates.
        rewards: q [B, K] by principal.
        terms: rule, agent temperature and weights of each row.
        uniforms: the uniform draw of each row.
        at_weights: q [B, K] for rules that take it at the row's weights (`reward_at_weights`).
    """
    if proposal.base_logprobs_BK.shape[1] <= FLOAT64_CANDIDATES:
        # a CPU solves such small games in less time than a GPU takes to start the solver's many small kernels
        proposal, rewards = proposal.cpu(), [reward.cpu() for reward in rewards]
        at_weights = None if at_weights is None else at_weights.cpu()
    base_BK, rewards_BJK = as_game(proposal, rewards)
    solved = solve(base_BK, rewards_BJK, terms, at_weights)
    uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=base_BK.device)
    return sample(options, proposal, solved, uniforms_B, [each.draw for each in terms])


def as_game(proposal: Candidates, rewards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The base's log-probabilities [B, K], normalized over the candidates, and the rewards [B, J, K].

    Both are in float64 up to FLOAT64_CANDIDATES candidates, in float32 beyond.
    """
    num_rows, num_candidates = proposal.base_logprobs_BK.shape
    dtype = torch.float64 if num_candidates <= FLOAT64_CANDIDATES else torch.float32
    base_BK = proposal.base_logprobs_BK.to(dtype).log_softmax(-1)
    if not rewards:
        return base_BK, base_BK.new_zeros(num_rows, 0, num_candidates)
    return base_BK, torch.stack([*rewards], 1).to(dtype)


def solve(
    base_BK: Tensor, rewards_BJK: Tensor, terms: Sequence[Terms], at_weights: Tensor | None = None
) -> SolvedStep:
    """Compute every row's policy from its base and its weighted rewards, by the row's rule.

    `at_weights` [B, K] takes the place of all rewards under rules that are `at_weights`.
    """
    as_numbers = partial(torch.tensor, dtype=base_BK.dtype, device=base_BK.device)
    temperatures = [each.agent_temperature for each in terms]
    is_shared = len(set(temperatures)) == 1
    weights_BJ = as_numbers([each.weights for each in terms]).view(len(terms), rewards_BJK.shape[1])
    values_BJK = weights_BJ[..., None] * rewards_BJK
    is_common = [each.rule.at_weights for each in terms]
    if any(is_common):
        assert at_weights is not None, "a rule takes the reward at the row's weights, and no role gives it"
        # together the principals want this reward once, whatever their weights sum to
        shares_BJ = weights_BJ / weights_BJ.sum(1, keepdim=True).clamp(min=torch.finfo(weights_BJ.dtype).tiny)
        common_BJK = shares_BJ[..., None] * at_weights.to(rewards_BJK)[:, None]
        is_common_B11 = torch.tensor(is_common, device=base_BK.device)[:, None, None]
        values_BJK = torch.where(is_common_B11, common_BJK, values_BJK)
    game = cage.Game(base_BK, values_BJK, temperatures[0] if is_shared else as_numbers(temperatures))
    return SolvedStep(game, rewards_BJK, _decide(game, weights_BJ, terms))


def sample(
    options: SamplingOptions,
    proposal: Candidates,
    solved: SolvedStep,
    uniforms_B: Tensor,
    draws: Sequence[tuple[float, float] | None] = (),
) -> SampledStep:
    """Draw a token from each row's policy, with what each principal pays for it. Does not wait for the device.

    `draws` has the temperature and top_p of rows whose are not those of the options.
    """
    game, rewards_BJK, decision = solved.game, solved.rewards_BJK, solved.decision
    log_policy_BK, base_BK = decision.log_policy, game.base_logprobs
    drawn_B1 = draw_rows(options, log_policy_BK, uniforms_B, draws)[:, None]
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
        kl_to_base(log_policy_BK, base_BK),
        proposal.covered_mass_B,
        decision.residual,
        decision.status,
        decision.num_steps,
        *rewards_BJK.gather(-1, at_BJ1)[..., 0].unbind(1),
        *paid_BJ.unbind(1),
        *thresholds_BJ.unbind(1),
    ]
    return SampledStep(torch.stack([column.double() for column in columns], 1))


def draw_rows(
    options: SamplingOptions,
    log_policy_BK: Tensor,
    uniforms_B: Tensor,
    draws: Sequence[tuple[float, float] | None],
) -> Tensor:
    """The index that each row draws, one call per temperature and top_p."""
    drawn_B = draw(log_policy_BK, uniforms_B, temperature=options.temperature, top_p=options.top_p)
    for own in dict.fromkeys(each for each in draws if each is not None):
        rows_R = torch.tensor([at for at, each in enumerate(draws) if each == own], device=uniforms_B.device)
        drawn_B[rows_R] = draw(log_policy_BK[rows_R], uniforms_B[rows_R], temperature=own[0], top_p=own[1])
    return drawn_B


def _decide(game: cage.Game, weights_BJ: Tensor, terms: Sequence[Terms]) -> cage.rules.Decision:
    """Apply every row's rule, one call per rule; thresholds are NaN in the rows whose rule has none."""
    rules = [each.rule for each in terms]
    if len(set(rules)) == 1:
        return _rule(rules[0], terms, weights_BJ)(game, weights_BJ)
    decision = cage.rules.Decision(
        log_policy=torch.empty_like(game.base_logprobs),
        thresholds=torch.full_like(weights_BJ, torch.nan),
        residual=torch.empty_like(game.base_logprobs[:, 0]),
        status=torch.empty_like(game.base_logprobs[:, 0], dtype=torch.int64),
        num_steps=torch.empty_like(game.base_logprobs[:, 0], dtype=torch.int32),
    )
    for rule in dict.fromkeys(rules):
        rows = [row for row, other in enumerate(rules) if other == rule]
        at_R = torch.tensor(rows, device=weights_BJ.device)
        part = _rule(rule, [terms[row] for row in rows], weights_BJ)(
            cage.Game(game.base_logprobs[at_R], game.values[at_R], game.row_temperatures[at_R]), weights_BJ[at_R]
        )
        for name in ("log_policy", "thresholds", "residual", "status", "num_steps"):
            if getattr(part, name) is not None:
                getattr(decision, name)[at_R] = getattr(part, name).to(getattr(decision, name).dtype)
    return decision


def _rule(name: RuleName, terms: Sequence[Terms], like: Tensor) -> cage.rules.Rule:
    """The rule of some rows, with their options; tensors are made in the type and on the device of `like`."""
    if not name.takes_k:
        return cage.rules.by_name[name]
    return cage.rules.SoftThreshold(like.new_tensor([each.k for each in terms]).view(len(terms), -1))


def kl_to_base(log_policy_BK: Tensor, base_BK: Tensor) -> Tensor:
    """KL(policy || base) [B] in nats over the candidates; what rounding puts below 0 is set to 0."""
    policy_BK = log_policy_BK.exp()
    return torch.where(policy_BK > 0, policy_BK * (log_policy_BK - base_BK), 0.0).sum(-1).clamp(min=0)
