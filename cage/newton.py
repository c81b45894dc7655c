"""Newton on the thresholds, the default method.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cage.elimination import solve_small
from cage.game import Game
from cage.scaled import ScaledGame, scale
from cage.solution import Solution, judge


@dataclass(frozen=True, slots=True)
class ThresholdNewton:
    """Newton on the log-residuals of the thresholds, from "nobody pays" (docs/mathematics.md)."""

    tol: float = 1e-6
    max_steps: int = 64

    def solve(self, game: Game) -> Solution:
        """Return one equilibrium a row."""
        scaled = scale(game)
        thresholds_BJ, num_steps_B = _iterate(scaled, self.tol, self.max_steps)
        return judge(game, scaled, thresholds_BJ, num_steps_B, self.tol)


def nobody_pays(scaled: ScaledGame) -> Tensor:
    """Return the lowest scaled thresholds at which no principal pays and none would be paid too little, [B, J]."""
    base_BV = scaled.log_base_BV.exp()
    mean = [(base_BV * scaled.values_BJV[:, j]).sum(-1) for j in range(scaled.values_BJV.shape[1])]
    return (torch.stack(mean, 1) + 1.0).clamp_min_(0.0) if mean else base_BV.new_zeros((base_BV.shape[0], 0))


def evaluate(scaled: ScaledGame, thresholds_BJ: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-residuals g [B, J] and their Jacobian dg_j/dc_k [B, J, J]."""
    excess_BJV = scaled.values_BJV - thresholds_BJ[..., None]
    paid_BJV = excess_BJV.clamp_min(0.0)
    slack_BJV = paid_BJV - excess_BJV
    logits_BV = scaled.log_base_BV
    for j in range(thresholds_BJ.shape[1]):
        logits_BV = logits_BV + paid_BJV[:, j]
    policy_BV = torch.softmax(logits_BV, -1)
    burden_BJV = policy_BV[:, None] * slack_BJV
    expected_BJ = burden_BJV.sum(-1)
    pays_BJV = (excess_BJV > 0.0).to(policy_BV.dtype)
    below_BJ = (policy_BV[:, None] * (slack_BJV > 0.0)).sum(-1)
    columns = []
    for k in range(thresholds_BJ.shape[1]):
        pays_BV = pays_BJV[:, k]
        share_B = (policy_BV * pays_BV).sum(-1)
        columns.append(share_B[:, None] - (burden_BJV * pays_BV[:, None]).sum(-1) / expected_BJ)
    jacobian_BJJ = torch.stack(columns, 2)
    jacobian_BJJ.diagonal(dim1=1, dim2=2).add_(below_BJ / expected_BJ)
    return expected_BJ.log(), jacobian_BJJ


def _iterate(scaled: ScaledGame, tol: float, max_steps: int) -> tuple[Tensor, Tensor]:
    point_BJ = nobody_pays(scaled)
    num_rows, num_principals = point_BJ.shape
    steps_B = torch.zeros(num_rows, dtype=torch.int32, device=point_BJ.device)
    if num_principals == 0 or num_rows == 0:
        return point_BJ, steps_B
    floor_BJ = scaled.values_BJV.amin(-1)
    trial_BJ = point_BJ
    direction_BJ = torch.zeros_like(point_BJ)
    length_B = torch.ones_like(point_BJ[:, 0])
    merit_B = torch.full_like(length_B, torch.inf)
    for _ in range(max_steps):
        running_B = merit_B > tol / 4
        if not bool(running_B.any()):
            break
        log_residual_BJ, jacobian_BJJ = evaluate(scaled, trial_BJ)
        trial_merit_B = log_residual_BJ.abs().amax(1)
        better_B = running_B & (trial_merit_B < merit_B * (1.0 - 1e-4 * length_B))
        point_BJ = torch.where(better_B[:, None], trial_BJ, point_BJ)
        merit_B = torch.where(better_B, trial_merit_B, merit_B)
        step_BJ = -solve_small(jacobian_BJJ, log_residual_BJ)
        direction_BJ = torch.where(better_B[:, None], step_BJ.nan_to_num(0.0, 0.0, 0.0), direction_BJ)
        length_B = torch.where(better_B, 1.0, length_B * 0.25)
        trial_BJ = point_BJ + length_B[:, None] * direction_BJ
        trial_BJ = torch.maximum(trial_BJ, 0.5 * (point_BJ + floor_BJ)).clamp_max_(1.0)
        steps_B = steps_B + running_B.int()
    return point_BJ, steps_B
