"""Jacobi and Gauss-Seidel with exact best responses: the paper's Algorithm 1 with its inner solver in closed form.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cage.game import Game
from cage.newton import nobody_pays
from cage.scaled import ScaledGame, scale
from cage.solution import Solution, expected_slack, judge, policy_at

_RESPONSE_STEPS = 200


@dataclass(frozen=True, slots=True)
class Jacobi:
    """Let every principal answer the others' previous offers at once (CAGE, Algorithm 1)."""

    tol: float = 1e-6
    max_steps: int = 100

    def solve(self, game: Game) -> Solution:
        """Return where the sweeps end; num_steps counts sweeps."""
        return _solve(game, _jacobi_sweep, self.tol, self.max_steps)


@dataclass(frozen=True, slots=True)
class GaussSeidel:
    """Let the principals answer one after another, each seeing the newest offers."""

    tol: float = 1e-6
    max_steps: int = 100

    def solve(self, game: Game) -> Solution:
        """Return where the sweeps end; num_steps counts sweeps."""
        return _solve(game, _gauss_seidel_sweep, self.tol, self.max_steps)


def best_response(scaled: ScaledGame, thresholds_BJ: Tensor, principal: int) -> Tensor:
    """Return principal's scaled threshold [B] that is optimal against the others' offers.

    Newton on the logarithm of E_pi[max(c - v, 0)], which increases in c, inside a bracket that only shrinks.
    """
    log_offer_BV = scaled.log_base_BV.clone()
    for j in range(thresholds_BJ.shape[1]):
        if j != principal:
            log_offer_BV += (scaled.values_BJV[:, j] - thresholds_BJ[:, j, None]).clamp_min_(0.0)
    values_BV = scaled.values_BJV[:, principal]
    outside_B = (torch.softmax(log_offer_BV, -1) * values_BV).sum(-1) + 1.0
    low_B, high_B = values_BV.amin(-1), torch.zeros_like(outside_B)
    point_B = high_B
    for _ in range(_RESPONSE_STEPS):
        residual_B, slope_B = _response_residual(log_offer_BV, values_BV, point_B)
        low_B = torch.where(residual_B < 0.0, point_B, low_B)
        high_B = torch.where(residual_B > 0.0, point_B, high_B)
        newton_B = point_B - residual_B / slope_B
        inside_B = (newton_B > low_B) & (newton_B < high_B)
        next_B = torch.where(inside_B, newton_B, 0.5 * (low_B + high_B))
        next_B = torch.where(residual_B == 0.0, point_B, next_B)
        if bool((next_B == point_B).all()):
            break
        point_B = next_B
    return torch.where(outside_B >= 0.0, outside_B, point_B)


def _response_residual(log_offer_BV: Tensor, values_BV: Tensor, point_B: Tensor) -> tuple[Tensor, Tensor]:
    excess_BV = values_BV - point_B[:, None]
    policy_BV = torch.softmax(log_offer_BV + excess_BV.clamp_min(0.0), -1)
    slack_B = (policy_BV * (-excess_BV).clamp_min(0.0)).sum(-1)
    below_B = (policy_BV * (excess_BV < 0.0)).sum(-1)
    return slack_B.log(), below_B / slack_B + (policy_BV * (excess_BV > 0.0)).sum(-1)


def _jacobi_sweep(scaled: ScaledGame, thresholds_BJ: Tensor) -> Tensor:
    return torch.stack([best_response(scaled, thresholds_BJ, j) for j in range(thresholds_BJ.shape[1])], 1)


def _gauss_seidel_sweep(scaled: ScaledGame, thresholds_BJ: Tensor) -> Tensor:
    thresholds_BJ = thresholds_BJ.clone()
    for j in range(thresholds_BJ.shape[1]):
        thresholds_BJ[:, j] = best_response(scaled, thresholds_BJ, j)
    return thresholds_BJ


def _solve(game: Game, sweep: Callable[[ScaledGame, Tensor], Tensor], tol: float, max_steps: int) -> Solution:
    scaled = scale(game)
    thresholds_BJ = nobody_pays(scaled)
    sweeps_B = torch.zeros(game.num_rows, dtype=torch.int32, device=thresholds_BJ.device)
    for _ in range(max_steps if game.num_principals else 0):
        _, policy_BV = policy_at(scaled, thresholds_BJ)
        residual_BJ = (expected_slack(scaled, policy_BV, thresholds_BJ) - 1.0).abs()
        running_B = residual_BJ.amax(1) > tol / 2
        if not bool(running_B.any()):
            break
        thresholds_BJ = torch.where(running_B[:, None], sweep(scaled, thresholds_BJ), thresholds_BJ)
        sweeps_B = sweeps_B + running_B.int()
    return judge(game, scaled, thresholds_BJ, sweeps_B, tol)
