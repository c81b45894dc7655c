"""How the agent and the principals' log-residuals respond to thresholds, with derivatives.

Shapes: B rows, J principals, K tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cage.elimination import solve_small
from cage.scaled import ScaledGame


class Response(NamedTuple):
    """log_residual [B, J] is g_j = log E_pi[max(c_j - v_j, 0)], zero at an equilibrium; jacobian is dg_j/dc_k.

    drift [B, J] is dg_j/d(log s) when all values are multiplied by s; None unless asked for.
    """

    log_residual: Tensor
    jacobian: Tensor
    drift: Tensor | None


def respond(game: ScaledGame, thresholds_BJ: Tensor, *, with_drift: bool = False) -> Response:
    """Evaluate the game at scaled thresholds (docs/mathematics.md, "The system and its Jacobian")."""
    excess_BJK = game.values - thresholds_BJ[..., None]
    paid_BJK = excess_BJK.clamp_min(0.0)
    policy_BK = torch.softmax(offers(game.log_base, paid_BJK), -1)[:, None]
    burden_BJK = excess_BJK.neg().clamp_min_(0.0).mul_(policy_BK)
    expected_BJ = burden_BJK.sum(-1)
    pays_BJK = pays(excess_BJK)
    share_BJ = (policy_BK * pays_BJK).sum(-1)
    crossed = [(burden_BJK * pays_BJK[:, k, None]).sum(-1) for k in range(thresholds_BJ.shape[1])]
    jacobian_BJJ = share_BJ[:, None] - torch.stack(crossed, 2) / expected_BJ[..., None]
    jacobian_BJJ.diagonal(dim1=1, dim2=2).add_((1.0 - share_BJ) / expected_BJ)
    drift_BJ = _drift(game, policy_BK, burden_BJK, pays_BJK, expected_BJ) if with_drift else None
    return Response(expected_BJ.log(), jacobian_BJJ, drift_BJ)


def offers(log_base_BK: Tensor, paid_BJK: Tensor) -> Tensor:
    """Return log pi0 + Y / tau [B, K], summed in the principals' order."""
    for j in range(paid_BJK.shape[1]):
        log_base_BK = log_base_BK + paid_BJK[:, j]
    return log_base_BK


def pays(excess: Tensor) -> Tensor:
    """Return 1 where the excess is positive, else 0, in its own type: far cheaper on a CPU than by way of bool."""
    return torch.gt(excess, 0.0, out=torch.empty_like(excess))


def newton_step(response: Response) -> Tensor:
    """Return the Newton step for the thresholds [B, J]; zero where the Jacobian is singular."""
    step_BJR, _ = solve_small(response.jacobian, response.log_residual[..., None])
    return step_BJR[..., 0].neg().nan_to_num_(0.0, 0.0, 0.0)


def lone_thresholds(game: ScaledGame) -> Tensor:
    """Return E_pi0[v_j] + tau in scaled units [B, J]: where principals stand while nobody pays."""
    return (game.log_base.exp()[:, None] * game.values).sum(-1) + 1.0


def nobody_pays(game: ScaledGame) -> Tensor:
    """Return thresholds [B, J] at which nobody pays and nobody would be better off with a higher one."""
    return lone_thresholds(game).clamp_min(0.0)


def _drift(game: ScaledGame, policy_BK: Tensor, burden: Tensor, pays: Tensor, expected_BJ: Tensor) -> Tensor:
    paid_values_BJK = game.values * pays
    total_BK = paid_values_BJK[:, 0]
    for j in range(1, pays.shape[1]):
        total_BK = total_BK + paid_values_BJK[:, j]
    below_BJ = (policy_BK * (game.values - paid_values_BJK)).sum(-1)
    moved_BJ = (burden * total_BK[:, None]).sum(-1)
    return (moved_BJ - below_BJ) / expected_BJ - (policy_BK[:, 0] * total_BK).sum(-1)[:, None]
