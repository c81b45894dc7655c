"""Ways to turn a base policy and values into one policy, behind one signature.

Every rule takes the same game; a decoder can switch between them. Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from cage.game import Game
from cage.newton import ThresholdNewton
from cage.solution import Solution, Status


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """A rule's policy and how it was reached; thresholds only where the rule is the equilibrium."""

    log_policy: Tensor
    thresholds: Tensor | None
    residual: Tensor
    status: Tensor
    num_steps: Tensor


class Rule(Protocol):
    """Decide a policy for every row; weights [B, J] are the preference weights, needed by `mixture` alone."""

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision: ...


class Method(Protocol):
    """Solve games for their equilibrium."""

    def solve(self, game: Game) -> Solution: ...


def base(game: Game, weights: Tensor | None = None) -> Decision:
    """Leave the base policy as it is."""
    return _closed_form(torch.log_softmax(game.base_logprobs, -1))


def linear(game: Game, weights: Tensor | None = None) -> Decision:
    """Tilt the base by the sum of all values: softmax(log pi0 + sum_j v_j / tau)."""
    return _closed_form(torch.log_softmax(_tilted(game, torch.ones_like(game.values[..., 0])), -1))


def mixture(game: Game, weights: Tensor | None = None) -> Decision:
    """Mix each principal's own tilted policy: sum_j w_j softmax(log pi0 + q_j / tau), with q_j = v_j / w_j.

    Weights [B, J] must be given and are normalised to sum 1; a zero weight takes no part.
    """
    if weights is None:
        raise ValueError("mixture needs weights [rows, principals]; got None")
    if tuple(weights.shape) != tuple(game.values.shape[:2]):
        raise ValueError(f"weights must be {tuple(game.values.shape[:2])}; got {tuple(weights.shape)}")
    if game.num_principals == 0:
        return base(game)
    weights_BJ = weights.to(game.values)
    parts = []
    for j in range(game.num_principals):
        rewards_BV = game.values[:, j] / weights_BJ[:, j, None]
        part_BV = torch.log_softmax(_offset(game, rewards_BV), -1) + weights_BJ[:, j, None].log()
        parts.append(torch.where(weights_BJ[:, j, None] > 0.0, part_BV, -torch.inf))
    log_mix_BV = parts[0]
    for part_BV in parts[1:]:
        log_mix_BV = torch.logaddexp(log_mix_BV, part_BV)
    nobody_B = (weights_BJ > 0.0).any(1).logical_not()
    log_mix_BV = torch.where(nobody_B[:, None], game.base_logprobs, log_mix_BV)
    return _closed_form(torch.log_softmax(log_mix_BV, -1))


@dataclass(frozen=True, slots=True)
class Maximin:
    """Tilt towards the worst-off principal: softmax(log pi0 + sum_j l_j v_j / tau), l minimising the log-partition."""

    tol: float = 1e-6
    max_steps: int = 2000

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision:
        return base(game)


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """Let the principals bid: the equilibrium of the common-agency game."""

    method: Method = ThresholdNewton()

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision:
        solution = self.method.solve(game)
        return Decision(
            solution.log_policy, solution.thresholds, solution.residual, solution.status, solution.num_steps
        )


def _offset(game: Game, tilt_BV: Tensor) -> Tensor:
    tilted_BV = game.base_logprobs + tilt_BV / game.temperature_B[:, None]
    return torch.where(game.base_logprobs > -torch.inf, tilted_BV, game.base_logprobs)


def _tilted(game: Game, shares_BJ: Tensor) -> Tensor:
    total_BV = torch.zeros_like(game.base_logprobs)
    for j in range(game.num_principals):
        total_BV = total_BV + shares_BJ[:, j, None] * game.values[:, j]
    return _offset(game, total_BV)


def _closed_form(log_policy_BV: Tensor) -> Decision:
    bad_B = torch.isnan(log_policy_BV).any(-1) | (log_policy_BV == torch.inf).any(-1)
    zeros_B = torch.zeros_like(log_policy_BV[:, 0])
    return Decision(
        log_policy=torch.where(bad_B[:, None], torch.nan, log_policy_BV),
        thresholds=None,
        residual=torch.where(bad_B, torch.nan, zeros_B),
        status=torch.where(bad_B, int(Status.NOT_FINITE), int(Status.CONVERGED)),
        num_steps=torch.zeros_like(bad_B, dtype=torch.int32),
    )


maximin = Maximin()
equilibrium = Equilibrium()
by_name: Mapping[str, Rule] = MappingProxyType(
    {"base": base, "linear": linear, "mixture": mixture, "maximin": maximin, "equilibrium": equilibrium}
)
