"""The answer to a batch of games, and whether to believe it.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from cage.game import Game
from cage.scaled import ScaledGame


class Status(IntEnum):
    """Say how the solve of one row ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    NOT_FINITE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """One equilibrium a row, recomputed from its thresholds.

    log_policy [B, V]; thresholds [B, J] and utilities [B, J] in the unit of the values; residual [B] is
    max_j |E_pi[max(c_j - v_j, 0)] / tau - 1|, 0 exactly at an equilibrium; status [B] holds `Status` values;
    num_steps [B] counts evaluations. Rows that are not finite hold NaN.
    """

    game: Game
    log_policy: Tensor
    policy: Tensor
    thresholds: Tensor
    utilities: Tensor
    residual: Tensor
    status: Tensor
    num_steps: Tensor

    @property
    def incentives(self) -> Tensor:
        """Return what every principal pays for every token, [B, J, V]; 0 where a token cannot be drawn."""
        drawable_BV = self.game.base_logprobs > -torch.inf
        excess_BJV = (self.game.values - self.thresholds[..., None]).clamp_min(0.0)
        return torch.where(drawable_BV[:, None], excess_BJV, 0.0)


def policy_at(scaled: ScaledGame, thresholds_BJ: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log policy, policy) [B, V] of the agent when principals pay above these scaled thresholds."""
    logits_BV = scaled.log_base_BV.clone()
    for j in range(thresholds_BJ.shape[1]):
        logits_BV += (scaled.values_BJV[:, j] - thresholds_BJ[:, j, None]).clamp_min_(0.0)
    log_policy_BV = torch.log_softmax(logits_BV, -1)
    return log_policy_BV, log_policy_BV.exp()


def expected_slack(scaled: ScaledGame, policy_BV: Tensor, thresholds_BJ: Tensor) -> Tensor:
    """Return E_pi[max(c_j - v_j, 0)] in agent temperatures, [B, J]; 1 everywhere at an equilibrium."""
    slack = [
        (policy_BV * (thresholds_BJ[:, j, None] - scaled.values_BJV[:, j]).clamp_min_(0.0)).sum(-1)
        for j in range(thresholds_BJ.shape[1])
    ]
    return torch.stack(slack, 1) if slack else thresholds_BJ


def judge(game: Game, scaled: ScaledGame, thresholds_BJ: Tensor, num_steps_B: Tensor, tol: float) -> Solution:
    """Recompute everything a Solution reports from its scaled thresholds."""
    log_policy_BV, policy_BV = policy_at(scaled, thresholds_BJ)
    slack_BJ = expected_slack(scaled, policy_BV, thresholds_BJ)
    residual_B = (slack_BJ - 1.0).abs().amax(1) if thresholds_BJ.shape[1] else torch.zeros_like(scaled.temperature_B)
    status_B = torch.where(residual_B <= tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    finite_B = scaled.finite_B
    blank_B = torch.where(finite_B, 0.0, torch.nan).to(policy_BV)
    thresholds_out_BJ = scaled.thresholds(thresholds_BJ)
    return Solution(
        game=game,
        log_policy=log_policy_BV + blank_B[:, None],
        policy=policy_BV + blank_B[:, None],
        thresholds=thresholds_out_BJ,
        utilities=thresholds_out_BJ - slack_BJ * scaled.temperature_B[:, None],
        residual=residual_B + blank_B,
        status=torch.where(finite_B, status_B, int(Status.NOT_FINITE)),
        num_steps=num_steps_B,
    )
