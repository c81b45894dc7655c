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
from cage.normalization import NormalizedGame
from cage.response import lone_thresholds, respond
from cage.rows import iterate

# how close to the curve a point must be to go on from it, and the most steps; rows that stall walk with more care
_CARES = ((3e-2, 1000), (1e-3, 1000), (1e-5, 4000), (1e-7, 4000))
_FIRST_STRIDE = 1.0
_LONGER, _SHORTER = 2.5, 0.3
_MOST_CORRECTIONS = 4
_MOST_LANDINGS = 10
_LARGEST_DETOUR = 0.5  # of the stride; a corrected point further off may lie on another branch
_DETOUR_ALLOWANCE = 0.03
_LARGEST_UNSEEN = 0.1  # of the stride; a longer step onto the curve is looked at
_HOPELESS_RESIDUAL = 5.0
_CORNER_STRIDE, _CORNER_COSINE = 0.05, 0.2
_SHORTEST_STRIDE = 1e-12


def follow_path(game: NormalizedGame, *, enough: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Return thresholds [B, J] at the first arrival at s = 1, and evaluations [B].

    Arrived is a row one Newton step after residuals of at most enough; rows that did not arrive hold their last
    point. Needs at least one principal and float64.
    """
    thresholds_BJ = torch.zeros_like(game.values[..., 0])
    rows = torch.arange(game.values.shape[0], device=game.values.device)
    num_steps_B = torch.zeros_like(rows, dtype=torch.int32)
    for care, most in _CARES:
        found_RJ, steps_R, arrived_R = _follow(game.rows(rows), enough, min(most, max_steps), care)
        thresholds_BJ = thresholds_BJ.index_copy(0, rows, found_RJ)
        num_steps_B = num_steps_B.index_add(0, rows, steps_R)
        rows, max_steps = rows[~arrived_R], max_steps - most
        if rows.shape[0] == 0 or max_steps <= 0:
            break
    return thresholds_BJ, num_steps_B


class Walk(NamedTuple):
    """One row's walk: a point on the curve with its tangent, and the trial that is being corrected.

    aimed: where the trial was put; reached: how far that is from the point; normal: corrections are orthogonal to
    it; landing: the trial is held at s = 1. A row that arrived holds its answer as its point.
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


class _Trial(NamedTuple):
    """A new trial, before it is looked at."""

    at: Tensor
    reached: Tensor
    landing: Tensor


def _follow(game: NormalizedGame, enough: float, max_steps: int, care: float) -> tuple[Tensor, Tensor, Tensor]:
    walk = iterate(partial(step_on, enough=enough, care=care), game, set_out(game), max_steps=max_steps)
    return walk.point[:, :-1], walk.num_steps, walk.arrived


def set_out(game: NormalizedGame) -> Walk:
    """Start where the first principal is about to pay, or at s = 1 if nobody does."""
    spread_BJ = 1.0 - lone_thresholds(game)
    log_factor_B = spread_BJ.amax(1).clamp_min(1.0).log().neg()
    start_BU = torch.cat([1.0 - spread_BJ * log_factor_B.exp()[:, None], log_factor_B[:, None]], 1)
    # nobody pays there: the thresholds are 1 - s spread_j, so the tangent needs no evaluation
    tangent_BU = _unit(torch.cat([start_BU[:, :-1] - 1.0, torch.ones_like(log_factor_B)[:, None]], 1))
    stride_B = torch.full_like(log_factor_B, _FIRST_STRIDE)
    trial = _ahead(start_BU, tangent_BU, stride_B)
    return Walk(
        running=stride_B > 0.0,
        num_steps=torch.zeros_like(stride_B, dtype=torch.int32),
        arrived=stride_B < 0.0,
        point=start_BU,
        tangent=tangent_BU,
        stride=stride_B,
        trial=trial.at,
        aimed=trial.at.clone(),  # one tensor as both would be compiled apart from two
        reached=trial.reached,
        normal=torch.where(trial.landing[:, None], _last_axis(start_BU), tangent_BU),
        landing=trial.landing,
        corrections=torch.zeros_like(stride_B, dtype=torch.int32),
    )


def step_on(game: NormalizedGame, walk: Walk, *, enough: float, care: float = _CARES[0][0]) -> Walk:
    """Look at the trial: accept it and stride on, correct it, or come back and try a shorter stride."""
    residual_B, newton_BU, tangent_BU = _look(game, walk.trial)
    near_B = _length(walk.trial - walk.aimed) <= _LARGEST_DETOUR * walk.reached + _DETOUR_ALLOWANCE
    close_B = near_B & (residual_B <= torch.where(walk.landing, enough, care))
    arrived_B = walk.running & close_B & walk.landing
    crossed_B = close_B & ~walk.landing & (walk.trial[:, -1] > 0.0)
    accepted_B = walk.running & close_B & ~walk.landing & ~crossed_B
    most_B = torch.where(walk.landing, _MOST_LANDINGS, _MOST_CORRECTIONS)
    corrected_B = ~close_B & near_B & (walk.corrections < most_B) & (residual_B <= _HOPELESS_RESIDUAL)
    stride_B = _next_stride(walk, accepted_B, ~close_B & ~corrected_B)
    # the step onto the curve is known already, so a short one is taken unseen
    unseen_B = _length(newton_BU) <= _LARGEST_UNSEEN * walk.reached
    onto_BU = walk.trial + torch.where(unseen_B[:, None], newton_BU, 0.0)
    point_BU = torch.where((accepted_B | arrived_B)[:, None], onto_BU, walk.point)
    walk = _changed(walk, tangent=torch.where(accepted_B[:, None], tangent_BU, walk.tangent), stride=stride_B)
    fresh = _choose(crossed_B, _between(walk), _ahead(point_BU, walk.tangent, stride_B))
    walk = _changed(
        walk,
        running=walk.running & ~arrived_B & (stride_B > _SHORTEST_STRIDE),
        num_steps=walk.num_steps + walk.running,
        arrived=walk.arrived | arrived_B,
        point=point_BU,
    )
    return _set_trial(walk, fresh, corrected_B, newton_BU, tangent_BU)


def _look(game: NormalizedGame, at_BU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual [B], a step onto the curve at fixed s, and the unit tangent of the curve's level set.

    The tangent points to larger s where the Jacobian has a positive determinant and to smaller s where it has a
    negative one: the sense in which a path that starts at "nobody pays" runs through every one of its pieces.
    """
    grown = NormalizedGame(game.log_base, game.values * at_BU[:, -1].exp()[:, None, None])
    response = respond(grown, at_BU[:, :-1], with_drift=True)
    assert response.drift is not None
    right_BJ2 = torch.stack([response.log_residual, response.drift], -1)
    solved_BJ2, sign_B = solve_small(response.jacobian, right_BJ2)
    solved_BJ2 = solved_BJ2.nan_to_num(0.0, 1e100, -1e100)
    zeros_B1 = torch.zeros_like(at_BU[:, :1])
    newton_BU = torch.cat([-solved_BJ2[..., 0], zeros_B1], 1)
    tangent_BU = torch.cat([-solved_BJ2[..., 1], zeros_B1 + 1.0], 1) * sign_B[:, None]
    return response.log_residual.abs().amax(1).nan_to_num(torch.inf), newton_BU, _unit(tangent_BU)


def _next_stride(walk: Walk, accepted_B: Tensor, rejected_B: Tensor) -> Tensor:
    grown_B = walk.stride * torch.where(walk.corrections <= 1, _LONGER, torch.where(walk.corrections >= 3, 0.7, 1.0))
    shrunk_B = torch.minimum(walk.stride, walk.reached) * _SHORTER
    return torch.where(accepted_B, grown_B, torch.where(rejected_B, shrunk_B, walk.stride))


def _set_trial(walk: Walk, fresh: _Trial, corrected_B: Tensor, newton_BU: Tensor, tangent_BU: Tensor) -> Walk:
    """Put the fresh trial, or where there is something to correct, move the old one orthogonally to the normal.

    Close to a point where the next piece of the curve leads elsewhere (a token changed sides), the trial is moved
    onto that piece and a little along it.
    """
    turned_B = (tangent_BU * walk.tangent).sum(1) < _CORNER_COSINE
    corner_B = corrected_B & turned_B & (walk.reached < _CORNER_STRIDE) & (walk.corrections == 0) & ~walk.landing
    corrected_B1, corner_B1 = corrected_B[:, None], corner_B[:, None]
    normal_BU = torch.where(corner_B1, tangent_BU, walk.normal)
    slide_B = (normal_BU * newton_BU).sum(1) / (normal_BU * tangent_BU).sum(1)
    correction_BU = (newton_BU - slide_B[:, None] * tangent_BU).nan_to_num_(0.0, 0.0, 0.0)
    beside_BU = walk.trial + torch.where(corner_B, 2.0 * walk.reached, 0.0)[:, None] * tangent_BU
    landing_B = torch.where(corrected_B, walk.landing, fresh.landing)
    along_BU = torch.where(landing_B[:, None], _last_axis(walk.trial), walk.tangent)
    return _changed(
        walk,
        trial=torch.where(corrected_B1, beside_BU + correction_BU, fresh.at),
        aimed=torch.where(corrected_B1, torch.where(corner_B1, beside_BU, walk.aimed), fresh.at),
        reached=torch.where(corrected_B, torch.where(corner_B, 4.0 * walk.reached, walk.reached), fresh.reached),
        normal=torch.where(corrected_B1, normal_BU, along_BU),
        landing=landing_B,
        corrections=torch.where(corrected_B, walk.corrections + 1, 0),
    )


def _changed(walk: Walk, **parts: Tensor) -> Walk:
    """What `_replace` does, which torch 2.11 cannot compile."""
    return Walk(*[parts.get(name, part) for name, part in zip(Walk._fields, walk, strict=True)])


def _ahead(point_BU: Tensor, tangent_BU: Tensor, stride_B: Tensor) -> _Trial:
    """Go a stride along the tangent, or exactly to s = 1 where the stride would pass it."""
    log_factor_B, rise_B = point_BU[:, -1], tangent_BU[:, -1]
    landing_B = (log_factor_B + stride_B * rise_B >= 0.0) & (rise_B > 0.0)
    reached_B = torch.where(landing_B, -log_factor_B / rise_B, stride_B)
    return _landed(point_BU + reached_B[:, None] * tangent_BU, reached_B, landing_B)


def _between(walk: Walk) -> _Trial:
    """Go back to s = 1 on the way from the point to a trial that was corrected past it."""
    gone_BU = walk.trial - walk.point
    share_B = (-walk.point[:, -1] / gone_BU[:, -1]).nan_to_num_(0.0, 0.0, 0.0)
    return _landed(walk.point + share_B[:, None] * gone_BU, _length(gone_BU), torch.ones_like(walk.landing))


def _landed(at_BU: Tensor, reached_B: Tensor, landing_B: Tensor) -> _Trial:
    at_BU[:, -1] = torch.where(landing_B, 0.0, at_BU[:, -1])
    return _Trial(at_BU, reached_B, landing_B)


def _choose(chosen_B: Tensor, one: _Trial, other: _Trial) -> _Trial:
    at_BU = torch.where(chosen_B[:, None], one.at, other.at)
    return _Trial(at_BU, torch.where(chosen_B, one.reached, other.reached), chosen_B | other.landing)


def _length(vector_BU: Tensor) -> Tensor:
    return vector_BU.square().sum(1).sqrt()


def _unit(vector_BU: Tensor) -> Tensor:
    vector_BU = vector_BU / vector_BU.abs().amax(1, keepdim=True)
    return (vector_BU / _length(vector_BU)[:, None]).nan_to_num_(0.0)


def _last_axis(like_BU: Tensor) -> Tensor:
    axis_BU = torch.zeros_like(like_BU)
    axis_BU[:, -1] = 1.0
    return axis_BU
