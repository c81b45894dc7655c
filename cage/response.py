"""How the agent's policy and the principals' log-residuals respond to thresholds, with derivatives.

Sums over principals and small linear systems are written out in elementwise operations: a batched matmul may round a
row differently in another batch.

Shapes: B rows, J principals, K tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cage.elimination import solve_small
from cage.normalization import NormalizedGame

_ELEMENTS_AT_ONCE = 2**17  # of a temporary; a larger one leaves a CPU's cache


class Response(NamedTuple):
    """The log-residuals of a game at some thresholds, and their derivatives.

    log_residual: g_j = log E_pi[max(c_j - v_j, 0)], 0 at an equilibrium, [B, J].
    jacobian: dg_j/dc_k, [B, J, J].
    drift: dg_j/d(log s) when all values are multiplied by s, [B, J]; None unless asked for.
    """

    log_residual: Tensor
    jacobian: Tensor
    drift: Tensor | None


def respond(game: NormalizedGame, thresholds_BJ: Tensor, *, with_drift: bool = False) -> Response:
    """Evaluate the game at scaled thresholds [B, J] (docs/mathematics.md, "The system and its Jacobian")."""
    excess_BJK = game.values - thresholds_BJ[..., None]
    paid_BJK = excess_BJK.clamp_min(0.0)
    policy_BK = torch.softmax(offers(game.log_base, paid_BJK), -1)[:, None]
    burden_BJK = (paid_BJK - excess_BJK).mul_(policy_BK)
    expected_BJ = burden_BJK.sum(-1)
    pays_BJK = pays(excess_BJK)
    share_BJ = (policy_BK * pays_BJK).sum(-1)
    jacobian_BJJ = share_BJ[:, None] - _crossed(burden_BJK, pays_BJK) / expected_BJ[..., None]
    jacobian_BJJ.diagonal(dim1=1, dim2=2).add_((1.0 - share_BJ) / expected_BJ)
    drift_BJ = _drift(game, policy_BK, burden_BJK, pays_BJK, expected_BJ) if with_drift else None
    return Response(expected_BJ.log(), jacobian_BJJ, drift_BJ)


def newton(game: NormalizedGame, thresholds_BJ: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-residuals [B, J] and the Newton step for the thresholds [B, J].

    One and two principals have a short form with few operations: over some tens of tokens the time goes into calling
    operations. The step may not be finite where a threshold is so low that every token is paid for, or where the
    Jacobian is singular.
    """
    num_principals = thresholds_BJ.shape[1]
    if num_principals > 2:
        response = respond(game, thresholds_BJ)
        return response.log_residual, newton_step(response)
    excess_BJK = game.values - thresholds_BJ[..., None]
    paid_BJK = excess_BJK.clamp_min(0.0)
    policy_BK = torch.softmax(offers(game.log_base, paid_BJK), -1)
    if num_principals == 1:
        return _step_of_one(excess_BJK, paid_BJK, policy_BK)
    return _step_of_two(excess_BJK, paid_BJK, policy_BK)


def offers(log_base_BK: Tensor, paid_BJK: Tensor) -> Tensor:
    """Return log pi0 + Y / tau [B, K], summed in the principals' order."""
    for paid_BK in paid_BJK.unbind(1):
        log_base_BK = log_base_BK + paid_BK
    return log_base_BK


def pays(excess: Tensor) -> Tensor:
    """Return 1 where the excess is positive, else 0, in its own type; converting from bool is slow on a CPU."""
    return torch.gt(excess, 0.0, out=torch.empty_like(excess))


def newton_step(response: Response) -> Tensor:
    """Return the Newton step for the thresholds [B, J]; zero where the Jacobian is singular."""
    step_BJR, _ = solve_small(response.jacobian, response.log_residual[..., None])
    return step_BJR[..., 0].neg().nan_to_num_(0.0, 0.0, 0.0)


def no_offer_thresholds(game: NormalizedGame) -> Tensor:
    """Return the scaled E_pi0[v_j] + tau [B, J]: each principal's threshold while nobody pays."""
    return (game.log_base.exp()[:, None] * game.values).sum(-1) + 1.0


def nobody_pays(game: NormalizedGame) -> Tensor:
    """Return the start of Newton [B, J]: the smallest thresholds at which nobody pays and no residual is negative."""
    return no_offer_thresholds(game).clamp_min(0.0)


def _step_of_one(excess_B1K: Tensor, paid_B1K: Tensor, policy_BK: Tensor) -> tuple[Tensor, Tensor]:
    parts_B2K = torch.cat([paid_B1K - excess_B1K, pays(excess_B1K)], 1)
    expected_B1, share_B1 = parts_B2K.mul_(policy_BK[:, None]).sum(-1).chunk(2, 1)
    log_residual_B1 = expected_B1.log()
    return log_residual_B1, (expected_B1 * log_residual_B1).neg_() / _own_slope(expected_B1, share_B1)


def _step_of_two(excess_B2K: Tensor, paid_B2K: Tensor, policy_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Solve by Cramer's rule, each equation multiplied by its E_pi[max(c_j - v_j, 0)], which saves the divisions.

    `other` means: of the other principal.
    """
    burden_B2K = paid_B2K - excess_B2K
    others_pay_B2K = pays(excess_B2K.flip(1))
    parts_B6K = torch.cat([burden_B2K, others_pay_B2K, burden_B2K * others_pay_B2K], 1)
    expected_B2, other_share_B2, crossed_B2 = parts_B6K.mul_(policy_BK[:, None]).sum(-1).chunk(3, 1)
    log_residual_B2 = expected_B2.log()
    right_B2 = expected_B2 * log_residual_B2
    own_B2 = _own_slope(expected_B2, other_share_B2.flip(1))
    cross_B2 = torch.addcmul(crossed_B2, expected_B2, other_share_B2, value=-1.0).neg_()
    (own_1, own_2), (cross_1, cross_2) = own_B2.unbind(1), cross_B2.unbind(1)
    determinant_B = torch.addcmul(own_1 * own_2, cross_1, cross_2, value=-1.0)
    step_B2 = torch.addcmul(cross_B2 * right_B2.flip(1), own_B2.flip(1), right_B2, value=-1.0)
    return log_residual_B2, step_B2 / determinant_B[:, None]


def _own_slope(expected_BJ: Tensor, share_BJ: Tensor) -> Tensor:
    """Return E dg_j/dc_j = pi(A_j) E + pi(not A_j)."""
    return torch.addcmul(1.0 - share_BJ, expected_BJ, share_BJ)


def _crossed(burden_BJK: Tensor, pays_BJK: Tensor) -> Tensor:
    """Return sum_a pi(a) s_j(a) 1[k pays for a], [B, J, J]; one k at a time where one temporary would be large."""
    num_principals = pays_BJK.shape[1]
    if burden_BJK.numel() * num_principals <= _ELEMENTS_AT_ONCE:
        return (burden_BJK[:, :, None] * pays_BJK[:, None]).sum(-1)
    return torch.stack([(burden_BJK * pays_BJK[:, k, None]).sum(-1) for k in range(num_principals)], 2)


def _drift(game: NormalizedGame, policy_BK: Tensor, burden: Tensor, pays: Tensor, expected_BJ: Tensor) -> Tensor:
    """Return dg_j/d(log s) at s = 1, [B, J]."""
    paid_values_BJK = game.values * pays
    total_BK = paid_values_BJK[:, 0]
    for j in range(1, pays.shape[1]):
        total_BK = total_BK + paid_values_BJK[:, j]
    below_BJ = (policy_BK * (game.values - paid_values_BJK)).sum(-1)
    moved_BJ = (burden * total_BK[:, None]).sum(-1)
    return (moved_BJ - below_BJ) / expected_BJ - (policy_BK[:, 0] * total_BK).sum(-1)[:, None]
