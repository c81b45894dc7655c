"""What a rule gains on recorded games, at a given distance from the base.

N games, J principals, K candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import cage
from cage.rules import Rule
from pipeline.sampling.games import kl_to_base

LOWEST, HIGHEST = math.exp(-7.0), math.exp(7.0)  # agent temperatures between which one is looked for
STRIDE = 4.0  # factor between the first ones that are tried
TOLERANCE = 1e-4  # of the mean KL, relative
MOST_STEPS = 60


@dataclass(frozen=True, slots=True, eq=False)
class Policies:
    """What a rule makes of the games.

    Args:
        log_policy_NK: in nats.
        agent_temperature: at which it was solved.
        kl: mean KL to the base, in nats.
    """

    log_policy_NK: Tensor
    agent_temperature: float
    kl: float


def policies(rule: Rule, base_NK: Tensor, values_NJK: Tensor, temperature: float, weights_J: Tensor) -> Policies:
    """Solve all games by a rule.

    Args:
        rule: of `cage.rules`.
        base_NK: log-probabilities of the base.
        values_NJK: v = w q, in nats.
        temperature: the agent's, above 0.
        weights_J: of the principals, which `mixture` needs.
    """
    weights_NJ = weights_J.to(values_NJK).expand(len(values_NJK), -1)
    log_policy_NK = rule(cage.Game(base_NK, values_NJK, temperature), weights_NJ).log_policy
    return Policies(log_policy_NK, temperature, float(kl_to_base(log_policy_NK, base_NK).mean()))


def at_equal_kl(rule: Rule, base_NK: Tensor, values_NJK: Tensor, target: float, weights_J: Tensor) -> Policies:
    """Solve all games at the agent temperature at which the rule's mean KL is `target` nats.

    A higher agent temperature leaves the base less far. Between two that enclose the target it is found by regula
    falsi on the logarithms (the Illinois variant): KL is nearly a power of the agent temperature. Where even the
    lowest temperature does not reach the target, its policies are returned, and their `kl` says so.
    """

    def at(log_temperature: float) -> tuple[Policies, float]:
        found = policies(rule, base_NK, values_NJK, math.exp(log_temperature), weights_J)
        return found, math.log(max(found.kl, 1e-300) / target)

    # the side that leaves the base too far, and the one that does not, as (log temperature, excess)
    place, stride = 0.0, math.log(STRIDE)
    found, excess = at(place)
    far, near = ((place, excess), None) if excess > 0 else (None, (place, excess))
    while far is None or near is None:
        place += stride if near is None else -stride
        if not math.log(LOWEST) <= place <= math.log(HIGHEST):
            return found
        found, excess = at(place)
        far, near = ((place, excess), near) if excess > 0 else (far, (place, excess))
    last_was_far: bool | None = None
    for _ in range(MOST_STEPS):
        if abs(excess) < TOLERANCE:
            break
        # kinks of rules with thresholds can make an end worthless; the midpoint then takes its place
        share = far[1] / (far[1] - near[1])
        place = far[0] + (share if 0.02 < share < 0.98 else 0.5) * (near[0] - far[0])
        found, excess = at(place)
        is_far = excess > 0
        if is_far:
            far, near = (place, excess), (near[0], near[1] / 2 if last_was_far is True else near[1])
        else:
            far, near = (far[0], far[1] / 2 if last_was_far is False else far[1]), (place, excess)
        last_was_far = is_far
    return found


def gains(found: Policies, base_NK: Tensor, rewards_NJK: Tensor) -> Tensor:
    """E_pi[q] - E_pi0[q] in nats by game and principal, [N, J]."""
    moved_NK = found.log_policy_NK.exp() - base_NK.exp()
    # a candidate that min_p dropped has probability 0 under both, and may have any q
    worth_NJK = torch.where(moved_NK[:, None] == 0, 0.0, moved_NK[:, None] * rewards_NJK)
    return worth_NJK.sum(-1)
