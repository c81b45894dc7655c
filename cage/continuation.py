"""Follow the equilibrium from "nobody pays" while the agent temperature falls.

The unknowns are u = (c_1, ..., c_J, log s): scaled thresholds, and the factor s by which all values are multiplied.
At small s nobody pays; s = 1 is the game to solve. The solutions form a curve of smooth pieces. It is followed by
arc length, so that it may turn back in s where an equilibrium ends (three or more principals).

Shapes: B rows, J principals, U = J + 1 unknowns, K tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cage.elimination import solve_small
from cage.response import lone_thresholds, respond
from cage.rows import iterate
from cage.scaled import ScaledGame

_CARES = (1e-3, 1e-5)  # how close to the curve a point must be to go on from it; the second for rows that stall
_FIRST_STRIDE = 1.0
_LONGER, _SHORTER = 2.5, 0.3
_MOST_CORRECTIONS = 4
_MOST_LANDINGS = 10
_LARGEST_DETOUR = 0.5  # of the stride; a corrected point further off may lie on another branch
_DETOUR_ALLOWANCE = 0.03
_HOPELESS_RESIDUAL = 5.0
_CORNER_STRIDE, _CORNER_COSINE = 0.05, 0.2
_SHORTEST_STRIDE = 1e-12


def follow_path(game: ScaledGame, *, aim: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Return thresholds [B, J] at the first arrival at s = 1, with residuals of at most aim, and evaluations [B].

    Rows that did not arrive hold their last point. Needs at least one principal and float64.
    """
    thresholds_BJ, num_steps_B, arrived_B = _follow(game, aim, max_steps // len(_CARES), _CARES[0])
    for care in _CARES[1:]:
        stalled = (~arrived_B).nonzero()[:, 0]
        if stalled.shape[0] == 0:
            break
        found_RJ, more_R, arrived_R = _follow(game.rows(stalled), aim, max_steps // len(_CARES), care)
        thresholds_BJ = thresholds_BJ.index_copy(0, stalled, found_RJ)
        num_steps_B = num_steps_B.index_add(0, stalled, more_R)
        arrived_B = arrived_B.index_copy(0, stalled, arrived_R)
    return thresholds_BJ, num_steps_B


class _Walk(NamedTuple):
    """One row's walk: a point on the curve with its tangent, and the trial that is being corrected.

    reached: how far the trial was put from the point; aimed: where it was put; normal: corrections are orthogonal
    to it; landing: the trial is held at s = 1.
    """

    running: Tensor
    num_steps: Tensor
    arrived: Tensor
    point: Tensor
    tangent: Tensor
    stride: Tensor
    trial: Tensor
    aimed: Tensor
    reached: Tensor
    normal: Tensor
    landing: Tensor
    corrections: Tensor


def _follow(game: ScaledGame, aim: float, max_steps: int, care: float) -> tuple[Tensor, Tensor, Tensor]:
    state = iterate(partial(_step, aim=aim, care=care), game, _set_out(game), max_steps=max_steps)
    return torch.where(state.arrived[:, None], state.trial, state.point)[:, :-1], state.num_steps, state.arrived


def _set_out(game: ScaledGame) -> _Walk:
    """Start where the first principal is about to pay, or at s = 1 if nobody does."""
    spread_BJ = 1.0 - lone_thresholds(game)
    log_factor_B = spread_BJ.amax(1).clamp_min(1.0).log().neg()
    start_BU = torch.cat([1.0 - spread_BJ * log_factor_B.exp()[:, None], log_factor_B[:, None]], 1)
    zeros_B = torch.zeros_like(log_factor_B)
    count_B = torch.zeros_like(log_factor_B, dtype=torch.int32)
    # nobody pays there: the thresholds are 1 - s spread_j, so the tangent needs no evaluation
    tangent_BU = torch.cat([start_BU[:, :-1] - 1.0, torch.ones_like(log_factor_B)[:, None]], 1)
    walk = _Walk(
        running=zeros_B == 0.0,
        num_steps=count_B,
        arrived=zeros_B > 0.0,
        point=start_BU,
        tangent=_unit(tangent_BU),
        stride=zeros_B + _FIRST_STRIDE,
        trial=start_BU,
        aimed=start_BU,
        reached=zeros_B,
        normal=tangent_BU,
        landing=zeros_B > 0.0,
        corrections=count_B,
    )
    return _set_trial(walk, walk.running)


def _step(game: ScaledGame, walk: _Walk, *, aim: float, care: float) -> _Walk:
    """Look at the trial: accept it and stride on, correct it, or come back and try a shorter stride."""
    residual_B, newton_BU, tangent_BU = _look(game, walk.trial)
    allowance_B = _LARGEST_DETOUR * walk.reached + _DETOUR_ALLOWANCE
    near_B = _length(walk.trial - walk.aimed) <= allowance_B
    close_B = walk.running & near_B & (residual_B <= torch.where(walk.landing, aim, care))
    arrived_B = close_B & walk.landing
    crossed_B = close_B & ~walk.landing & (walk.trial[:, -1] > 0.0)
    accepted_B = close_B & ~walk.landing & ~crossed_B
    most_B = torch.where(walk.landing, _MOST_LANDINGS, _MOST_CORRECTIONS)
    hopeless_B = ~near_B | (walk.corrections >= most_B) | ~(residual_B <= _HOPELESS_RESIDUAL)
    rejected_B = walk.running & ~close_B & hopeless_B
    corrected_B = walk.running & ~close_B & ~rejected_B
    corner_B = corrected_B & (walk.corrections == 0) & ~walk.landing & _turns(walk, tangent_BU)
    landed = _land(walk, crossed_B)
    walk = walk._replace(running=walk.running & ~arrived_B, num_steps=walk.num_steps + walk.running)
    walk = _correct(walk, corrected_B, corner_B, newton_BU, tangent_BU)
    walk = _stride_on(walk, accepted_B, rejected_B, tangent_BU)
    walk = _choose(crossed_B, landed, walk)
    return walk._replace(running=walk.running & (walk.stride > _SHORTEST_STRIDE), arrived=walk.arrived | arrived_B)


def _look(game: ScaledGame, at_BU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual [B], a step onto the curve at fixed s, and the unit tangent of the curve's level set.

    The tangent points to larger s where the Jacobian has a positive determinant and to smaller s where it has a
    negative one: the sense in which a path that starts at "nobody pays" runs through every one of its pieces.
    """
    grown = ScaledGame(game.log_base, game.values * at_BU[:, -1].exp()[:, None, None])
    response = respond(grown, at_BU[:, :-1], with_drift=True)
    assert response.drift is not None
    right_BJ2 = torch.stack([response.log_residual, response.drift], -1)
    solved_BJ2, sign_B = solve_small(response.jacobian, right_BJ2)
    solved_BJ2 = solved_BJ2.nan_to_num(0.0, 1e100, -1e100)
    zeros_B1 = torch.zeros_like(at_BU[:, :1])
    newton_BU = torch.cat([-solved_BJ2[..., 0], zeros_B1], 1)
    tangent_BU = torch.cat([-solved_BJ2[..., 1], zeros_B1 + 1.0], 1) * sign_B[:, None]
    return response.log_residual.abs().amax(1).nan_to_num(torch.inf), newton_BU, _unit(tangent_BU)


def _turns(walk: _Walk, tangent_BU: Tensor) -> Tensor:
    """Say where the curve has a corner just ahead: a token changed sides, and the next piece leads elsewhere."""
    return (walk.reached < _CORNER_STRIDE) & ((tangent_BU * walk.tangent).sum(1) < _CORNER_COSINE)


def _correct(walk: _Walk, corrected_B: Tensor, corner_B: Tensor, newton_BU: Tensor, tangent_BU: Tensor) -> _Walk:
    """Move the trial onto the curve, orthogonally to the normal; past a corner, a little along the new piece."""
    normal_BU = torch.where(corner_B[:, None], tangent_BU, walk.normal)
    slide_B = (normal_BU * newton_BU).sum(1) / (normal_BU * tangent_BU).sum(1)
    correction_BU = (newton_BU - slide_B[:, None] * tangent_BU).nan_to_num(0.0, 0.0, 0.0)
    ahead_BU = torch.where(corner_B, 2.0 * walk.reached, 0.0)[:, None] * tangent_BU
    moved = walk._replace(
        trial=walk.trial + correction_BU + ahead_BU,
        aimed=torch.where(corner_B[:, None], walk.trial + ahead_BU, walk.aimed),
        reached=torch.where(corner_B, 4.0 * walk.reached, walk.reached),
        normal=normal_BU,
        corrections=walk.corrections + 1,
    )
    return _choose(corrected_B, moved, walk)


def _stride_on(walk: _Walk, accepted_B: Tensor, rejected_B: Tensor, tangent_BU: Tensor) -> _Walk:
    """Take the trial as the new point where it was accepted, and put the next trial a stride ahead."""
    easy_B, hard_B = walk.corrections <= 1, walk.corrections >= 3
    grown_B = walk.stride * torch.where(easy_B, _LONGER, torch.where(hard_B, 0.7, 1.0))
    shrunk_B = torch.minimum(walk.stride, walk.reached) * _SHORTER
    stride_B = torch.where(accepted_B, grown_B, torch.where(rejected_B, shrunk_B, walk.stride))
    walk = walk._replace(
        point=torch.where(accepted_B[:, None], walk.trial, walk.point),
        tangent=torch.where(accepted_B[:, None], tangent_BU, walk.tangent),
        stride=stride_B,
    )
    return _set_trial(walk, accepted_B | rejected_B)


def _set_trial(walk: _Walk, chosen_B: Tensor) -> _Walk:
    """Put the trial a stride along the tangent, or exactly at s = 1 where the stride would pass it."""
    log_factor_B, rise_B = walk.point[:, -1], walk.tangent[:, -1]
    landing_B = (log_factor_B + walk.stride * rise_B >= 0.0) & (rise_B > 0.0)
    reached_B = torch.where(landing_B, -log_factor_B / rise_B, walk.stride)
    trial_BU = walk.point + reached_B[:, None] * walk.tangent
    trial_BU[:, -1] = torch.where(landing_B, 0.0, trial_BU[:, -1])
    ready = walk._replace(
        trial=trial_BU,
        aimed=trial_BU,
        reached=reached_B,
        normal=torch.where(landing_B[:, None], _last_axis(trial_BU), walk.tangent),
        landing=landing_B,
        corrections=torch.zeros_like(walk.corrections),
    )
    return _choose(chosen_B, ready, walk)


def _land(walk: _Walk, crossed_B: Tensor) -> _Walk:
    """Hold at s = 1 a trial that was corrected past it, between the point and where it got to."""
    gone_BU = walk.trial - walk.point
    share_B = (-walk.point[:, -1] / gone_BU[:, -1]).nan_to_num(0.0, 0.0, 0.0)
    trial_BU = walk.point + share_B[:, None] * gone_BU
    trial_BU[:, -1] = torch.where(crossed_B, 0.0, trial_BU[:, -1])
    return walk._replace(
        trial=trial_BU,
        aimed=trial_BU,
        reached=_length(gone_BU),
        normal=_last_axis(trial_BU),
        landing=torch.ones_like(walk.landing),
        corrections=torch.zeros_like(walk.corrections),
        num_steps=walk.num_steps + 1,
    )


def _choose(chosen_B: Tensor, changed: _Walk, unchanged: _Walk) -> _Walk:
    parts = [
        torch.where(chosen_B if new.dim() == 1 else chosen_B[:, None], new, old)
        for new, old in zip(changed, unchanged, strict=True)
    ]
    return _Walk(*parts)


def _length(vector_BU: Tensor) -> Tensor:
    return vector_BU.square().sum(1).sqrt()


def _unit(vector_BU: Tensor) -> Tensor:
    vector_BU = vector_BU / vector_BU.abs().amax(1, keepdim=True)
    return (vector_BU / _length(vector_BU)[:, None]).nan_to_num(0.0)


def _last_axis(like_BU: Tensor) -> Tensor:
    axis_BU = torch.zeros_like(like_BU)
    axis_BU[:, -1] = 1.0
    return axis_BU
