"""The robust rule's inner problem: the mix of principals that makes their joint tilt weakest.

min over shares l of A(l) = log sum_a pi0(a) exp(sum_j l_j v_j(a) / tau), convex with gradient E_pi[v_j] / tau.
By duality its policy maximises min_j E_pi[v_j] - tau KL(pi || pi0).

Shapes: B rows, J principals, K tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cage.elimination import solve_small
from cage.normalization import NormalizedGame
from cage.rows import iterate

_BARRIER_DECREASE = 0.1
_CENTRED = 0.1  # Newton decrement, relative to the barrier, from which the barrier may decrease
_TO_THE_BOUNDARY = 0.95
_SLOPE_NOISE = 1e-16
_SHORTEST_LENGTH = 2.0**-40


class _Interior(NamedTuple):
    """A point inside the simplex, and a Newton direction of the barrier problem from it.

    gap: l . grad - min_j grad_j >= A(l) - A(best), in agent temperatures; slope: the direction's derivative.
    """

    running: Tensor
    num_steps: Tensor
    shares: Tensor
    gap: Tensor
    barrier: Tensor
    direction: Tensor
    length: Tensor
    slope: Tensor
    present: Tensor
    offset: Tensor


def find_shares(
    game: NormalizedGame, offset_BJ: Tensor, *, tol: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shares l [B, J], their gap to optimality [B] and the number of evaluations [B].

    offset [B, J] is each principal's best value in agent temperatures, which scaling took away. A principal whose
    values are constant is absent: its share is 0. A barrier method: Newton with exact second derivatives, the
    barrier lowered until the gap is at most tol.
    """
    present_BJ = (game.values.amin(-1) < 0.0).to(game.values.dtype)
    num_present_B = present_BJ.sum(1)
    shares_BJ = present_BJ / num_present_B.clamp_min(1.0)[:, None]
    zeros_B = torch.zeros_like(num_present_B)
    state = _Interior(
        running=num_present_B > 1.0,
        num_steps=zeros_B.to(torch.int32),
        shares=shares_BJ,
        gap=zeros_B,
        barrier=zeros_B - 1.0,
        direction=torch.zeros_like(shares_BJ),
        length=zeros_B + 1.0,
        slope=zeros_B,
        present=present_BJ,
        offset=offset_BJ,
    )
    state = iterate(partial(_step, tol=tol), game, state, max_steps=max_steps)
    return state.shares, state.gap, state.num_steps


def tilted(game: NormalizedGame, shares_BJ: Tensor) -> Tensor:
    """Return log pi0 + sum_j l_j v_j / tau up to a constant, [B, K]."""
    logits_BK = game.log_base
    for j in range(shares_BJ.shape[1]):
        logits_BK = logits_BK + shares_BJ[:, j, None] * game.values[:, j]
    return logits_BK


def _step(game: NormalizedGame, state: _Interior, *, tol: float) -> _Interior:
    """Look a length along the direction: go there unless the barrier problem rises again, else try half as far."""
    started_B = state.barrier > 0.0
    trial_BJ = state.shares + (state.length * started_B)[:, None] * state.direction
    gradient_BJ, hessian_BJJ = _moments(game, trial_BJ)
    gradient_BJ = _centred(gradient_BJ + state.offset, state.present)
    gap_B = _gap(gradient_BJ, trial_BJ, state.present)
    barrier_B = torch.where(started_B, state.barrier, gap_B)
    slope_B = ((gradient_BJ - barrier_B[:, None] * _inverse(trial_BJ, state.present)) * state.direction).sum(1)
    falls_B = (slope_B <= 0.5 * state.slope.abs() + _SLOPE_NOISE) | (state.length < _SHORTEST_LENGTH)
    fine_B = state.running & (~started_B | falls_B)
    # near the centre of one barrier, aim for that of a lower one
    _, decrement_B = _newton(gradient_BJ, hessian_BJJ, trial_BJ, barrier_B, state.present)
    lowest_B = tol / (4.0 * state.present.sum(1))  # where the gap is a quarter of tol; lower only costs digits
    decreased_B = torch.maximum(barrier_B * _BARRIER_DECREASE, lowest_B)
    lower_B = torch.where(decrement_B <= _CENTRED * barrier_B, decreased_B, barrier_B)
    direction_BJ, decrement_B = _newton(gradient_BJ, hessian_BJJ, trial_BJ, lower_B, state.present)
    length_B = _longest(trial_BJ, direction_BJ)
    return state._replace(
        running=state.running & ~(fine_B & (gap_B <= tol)),
        num_steps=state.num_steps + state.running,
        shares=torch.where(fine_B[:, None], trial_BJ, state.shares),
        gap=torch.where(fine_B, gap_B, state.gap),
        barrier=torch.where(fine_B, lower_B, barrier_B),
        direction=torch.where(fine_B[:, None], direction_BJ, state.direction),
        length=torch.where(fine_B, length_B, state.length * 0.5),
        slope=torch.where(fine_B, -decrement_B, state.slope),
    )


def _moments(game: NormalizedGame, shares_BJ: Tensor) -> tuple[Tensor, Tensor]:
    """Return E_pi[v_j] [B, J] and Cov_pi(v_j, v_k) [B, J, J] under the tilted policy, in agent temperatures."""
    policy_BK = torch.softmax(tilted(game, shares_BJ), -1)[:, None]
    mean_BJ = (policy_BK * game.values).sum(-1)
    centred_BJK = game.values - mean_BJ[..., None]
    weighted_BJK = policy_BK * centred_BJK
    columns = [(weighted_BJK * centred_BJK[:, k, None]).sum(-1) for k in range(shares_BJ.shape[1])]
    return mean_BJ, torch.stack(columns, 2)


def _gap(gradient_BJ: Tensor, shares_BJ: Tensor, present_BJ: Tensor) -> Tensor:
    lowest_B1 = torch.where(present_BJ > 0.0, gradient_BJ, torch.inf).amin(1, keepdim=True)
    return torch.where(present_BJ > 0.0, shares_BJ * (gradient_BJ - lowest_B1), 0.0).sum(1)


def _centred(gradient_BJ: Tensor, present_BJ: Tensor) -> Tensor:
    """Take the mean away: what all shares have in common moves nothing, but would drown the rest in rounding."""
    mean_B = (gradient_BJ * present_BJ).sum(1) / present_BJ.sum(1)
    return (gradient_BJ - mean_B[:, None]) * present_BJ


def _inverse(shares_BJ: Tensor, present_BJ: Tensor) -> Tensor:
    return torch.where(present_BJ > 0.0, shares_BJ.reciprocal(), 0.0)


def _newton(
    gradient_BJ: Tensor, hessian_BJJ: Tensor, shares_BJ: Tensor, barrier_B: Tensor, present_BJ: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the Newton direction of A(l) - barrier sum_j log l_j within the simplex, and its squared decrement."""
    inverse_BJ = _inverse(shares_BJ, present_BJ)
    downhill_BJ = present_BJ * (barrier_B[:, None] * inverse_BJ - gradient_BJ)
    both_BJJ = present_BJ[:, :, None] * present_BJ[:, None]
    matrix_BJJ = hessian_BJJ * both_BJJ
    diagonal_BJ = barrier_B[:, None] * inverse_BJ.square() + (1.0 - present_BJ)
    matrix_BJJ.diagonal(dim1=1, dim2=2).add_(diagonal_BJ)
    top = torch.cat([matrix_BJJ, present_BJ[..., None]], 2)
    bottom = torch.cat([present_BJ, torch.zeros_like(present_BJ[:, :1])], 1)[:, None]
    right_BJ = torch.cat([downhill_BJ, torch.zeros_like(present_BJ[:, :1])], 1)
    solved, _ = solve_small(torch.cat([top, bottom], 1), right_BJ[..., None])
    direction_BJ = solved[:, :-1, 0].nan_to_num(0.0, 0.0, 0.0)
    return direction_BJ, (direction_BJ * downhill_BJ).sum(1)


def _longest(shares_BJ: Tensor, direction_BJ: Tensor) -> Tensor:
    """Return the longest step, at most 1, that stays inside the simplex."""
    room_BJ = torch.where(direction_BJ < 0.0, -_TO_THE_BOUNDARY * shares_BJ / direction_BJ, torch.inf)
    return room_BJ.amin(1).clamp_max(1.0)
