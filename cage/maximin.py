"""The inner problem of the maximin rule: the shares of the principals that minimise the log-partition.

min over shares l of A(l) = log sum_a pi0(a) exp(sum_j l_j v_j(a) / tau), convex with gradient E_pi[v_j] / tau.
By duality its policy maximises min_j E_pi[v_j] - tau KL(pi || pi0). A minimum may lie on the boundary of the simplex,
where Newton's model does not hold; so a logarithmic barrier keeps the shares inside and is lowered step by step (an
interior-point method).

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

_BARRIER_DECREASE = 0.1  # factor of the barrier when the shares are near its centre
_CENTRED = 0.1  # squared Newton decrement, relative to the barrier, below which the shares are near its centre
_TO_THE_BOUNDARY = 0.95  # of the distance to the boundary is the most that one step goes, so no share becomes 0
_SLOPE_NOISE = 1e-16  # float64's rounding: a smaller rise is none
_SHORTEST_LENGTH = 2.0**-40  # a step this short is accepted: only rounding can still reject it


class Interior(NamedTuple):
    """A point inside the simplex, and a Newton direction of the barrier problem from it.

    running [B], num_steps [B]: as `iterate` wants them.
    shares [B, J]: the point l.
    gap [B]: l . grad A - min_j dA/dl_j, which is at least A(l) - A(best), in agent temperatures.
    barrier [B]: weight of the barrier; negative before the first evaluation.
    direction [B, J]: where to go next; length [B]: how far, as a share of the direction.
    slope [B]: derivative of the barrier problem along the direction, at the point.
    present [B, J]: 1 for principals whose values are not constant, else 0.
    offset [B, J]: each principal's best value in agent temperatures.
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

    offset_BJ: each principal's best value in agent temperatures, which the normalization removed. Equilibria do not
        depend on it; the worst-off principal does.
    tol: largest gap, in agent temperatures, at which a row ends.
    max_steps: most evaluations of one row.

    A principal whose values are constant takes no part: its share is 0.
    """
    state = iterate(partial(advance, tol=tol), game, start(game, offset_BJ), max_steps=max_steps)
    return state.shares, state.gap, state.num_steps


def start(game: NormalizedGame, offset_BJ: Tensor) -> Interior:
    """Return the state at equal shares of all principals whose values are not constant."""
    present_BJ = (game.values.amin(-1) < 0.0).to(game.values.dtype)
    num_present_B = present_BJ.sum(1)
    shares_BJ = present_BJ / num_present_B.clamp_min(1.0)[:, None]
    zeros_B = torch.zeros_like(num_present_B)
    return Interior(
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


def tilted(game: NormalizedGame, shares_BJ: Tensor) -> Tensor:
    """Return log pi0 + sum_j l_j v_j / tau up to a constant, [B, K]."""
    logits_BK = game.log_base
    for j in range(shares_BJ.shape[1]):
        logits_BK = logits_BK + shares_BJ[:, j, None] * game.values[:, j]
    return logits_BK


def advance(game: NormalizedGame, state: Interior, *, tol: float) -> Interior:
    """Evaluate a trial along the direction, and accept it unless the barrier problem rises there.

    A rejected trial halves the length. Near the centre of a barrier, the next direction aims at that of a lower one.
    """
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
    lowest_B = tol / (4.0 * state.present.sum(1))  # where the gap is a quarter of tol; lower only loses digits
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
    """Subtract the mean over principals.

    Shares sum to 1, so a common constant changes nothing; but a large one would leave no digits for the differences.
    """
    mean_B = (gradient_BJ * present_BJ).sum(1) / present_BJ.sum(1)
    return (gradient_BJ - mean_B[:, None]) * present_BJ


def _inverse(shares_BJ: Tensor, present_BJ: Tensor) -> Tensor:
    return torch.where(present_BJ > 0.0, shares_BJ.reciprocal(), 0.0)


def _newton(
    gradient_BJ: Tensor, hessian_BJJ: Tensor, shares_BJ: Tensor, barrier_B: Tensor, present_BJ: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the Newton direction of A(l) - barrier sum_j log l_j [B, J], and its squared decrement [B].

    A last row and column of the system, with its multiplier, keep the sum of the shares at 1.
    """
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
    limit_BJ = torch.where(direction_BJ < 0.0, -_TO_THE_BOUNDARY * shares_BJ / direction_BJ, torch.inf)
    return limit_BJ.amin(1).clamp_max(1.0)
