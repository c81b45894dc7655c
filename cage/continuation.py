"""Follow the equilibrium from "nobody pays" while the agent temperature falls (docs/mathematics.md, section 5).

A predictor-corrector method. The unknowns are u = (c_1, ..., c_J, log s): scaled thresholds, and the factor s by
which all values are multiplied. At small s nobody pays; s = 1 is the game to solve. The solutions form a curve of
smooth pieces. It is followed by arc length rather than by s, because with three or more principals it may turn back
in s where an equilibrium ends.

Shapes: B rows (R of them in a later round), J principals, U = J + 1 unknowns, K tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cage.elimination import solve_small
from cage.normalization import NormalizedGame
from cage.response import no_offer_thresholds, respond
from cage.rows import iterate

# Rounds of (curve_tol, most steps). curve_tol is the largest log-residual of a point from which the path continues.
# Most rows arrive in the first round; a row that stalls starts again with a tighter tolerance.
_ROUNDS = ((3e-2, 1000), (1e-3, 1000), (1e-5, 4000), (1e-7, 4000))
# Lengths are in agent temperatures. These constants decide how many steps a path takes; they could change an answer
# only by a jump to another branch. `cage bench solver --sweep` counts what they leave unsolved.
_FIRST_STRIDE = 1.0
_LONGER, _SHORTER = 2.5, 0.3  # factors of the stride after an accepted and a rejected trial
_MOST_CORRECTIONS = 4
_MOST_LANDINGS = 10  # corrections at s = 1, where the residual must become much smaller
_LARGEST_DETOUR = 0.5  # of the stride; a corrected point further away may lie on another branch
_DETOUR_ALLOWANCE = 0.03  # added to that: the point itself may be this far from the curve (the first curve_tol)
_LARGEST_UNCHECKED = 0.1  # of the stride; a step onto the curve that is shorter is taken without evaluating there
_LARGEST_RESIDUAL = 5.0  # of a trial that is still worth correcting; from further away Newton rarely comes back
_CORNER_STRIDE, _CORNER_COSINE = 0.05, 0.2  # a shorter stride across which the tangent turns more is at a corner
_SHORTEST_STRIDE = 1e-12  # close to float64's rounding: a row that needs a shorter one has stalled


def follow_path(game: NormalizedGame, *, residual_tol: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Return scaled thresholds [B, J] at the first arrival at s = 1, and the number of evaluations [B].

    game: at least one principal, in float64: the path turns where a determinant of the Jacobian changes sign, and
        float32 cannot tell a small determinant from rounding.
    residual_tol: a row has arrived one Newton step after its largest log-residual at s = 1 is at most this.
    max_steps: most evaluations of one row, over all rounds. A row that does not arrive holds its last point.
    """
    thresholds_BJ = torch.zeros_like(game.values[..., 0])
    rows = torch.arange(game.values.shape[0], device=game.values.device)
    num_steps_B = torch.zeros_like(rows, dtype=torch.int32)
    for curve_tol, most in _ROUNDS:
        found_RJ, steps_R, arrived_R = _follow(game.rows(rows), residual_tol, min(most, max_steps), curve_tol)
        thresholds_BJ = thresholds_BJ.index_copy(0, rows, found_RJ)
        num_steps_B = num_steps_B.index_add(0, rows, steps_R)
        rows, max_steps = rows[~arrived_R], max_steps - most
        if rows.shape[0] == 0 or max_steps <= 0:
            break
    return thresholds_BJ, num_steps_B


class PathState(NamedTuple):
    """Where every row is on its path: a point on the curve with its tangent, and the trial that is being corrected.

    running [B]: the row takes part in the next step.
    num_steps [B]: evaluations so far.
    arrived [B]: the point is the answer, at s = 1.
    point [B, U]: the last accepted point.
    tangent [B, U]: unit tangent at the point, in the direction of travel.
    stride [B]: how far ahead of the point the next trial is placed.
    trial [B, U]: the candidate for the next point, evaluated by the next step.
    aimed [B, U]: where the trial was placed before any correction.
    reached [B]: distance from the point to there.
    normal [B, U]: corrections are orthogonal to it.
    landing [B]: the trial is held at s = 1.
    corrections [B]: how often the trial has been corrected.
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
    """A trial that has just been placed: its coordinates, its distance from the point, and if it is at s = 1."""

    at: Tensor
    reached: Tensor
    landing: Tensor


def _follow(
    game: NormalizedGame, residual_tol: float, max_steps: int, curve_tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    path = iterate(
        partial(advance, residual_tol=residual_tol, curve_tol=curve_tol), game, start_path(game), max_steps=max_steps
    )
    return path.point[:, :-1], path.num_steps, path.arrived


def start_path(game: NormalizedGame) -> PathState:
    """Return the state at the factor s at which the first principal is about to pay, or at s = 1 if nobody pays."""
    spread_BJ = 1.0 - no_offer_thresholds(game)
    log_factor_B = spread_BJ.amax(1).clamp_min(1.0).log().neg()
    start_BU = torch.cat([1.0 - spread_BJ * log_factor_B.exp()[:, None], log_factor_B[:, None]], 1)
    # nobody pays up to there: the thresholds are 1 - s spread_j, so the tangent is known without an evaluation
    tangent_BU = _unit(torch.cat([start_BU[:, :-1] - 1.0, torch.ones_like(log_factor_B)[:, None]], 1))
    stride_B = torch.full_like(log_factor_B, _FIRST_STRIDE)
    trial = _ahead(start_BU, tangent_BU, stride_B)
    return PathState(
        running=stride_B > 0.0,
        num_steps=torch.zeros_like(stride_B, dtype=torch.int32),
        arrived=stride_B < 0.0,
        point=start_BU,
        tangent=tangent_BU,
        stride=stride_B,
        trial=trial.at,
        aimed=trial.at.clone(),  # torch.compile would compile again for a state in which two fields are one tensor
        reached=trial.reached,
        normal=torch.where(trial.landing[:, None], _last_axis(start_BU), tangent_BU),
        landing=trial.landing,
        corrections=torch.zeros_like(stride_B, dtype=torch.int32),
    )


def advance(
    game: NormalizedGame, path: PathState, *, residual_tol: float, curve_tol: float = _ROUNDS[0][0]
) -> PathState:
    """Evaluate the trial: accept it and go on, correct it, or return to the point and try a shorter stride.

    residual_tol: largest log-residual of a trial at s = 1 that is accepted.
    curve_tol: largest log-residual of any other trial that is accepted.

    Rows that are not running stay as they are, and no value is read back from the device.
    """
    residual_B, newton_BU, tangent_BU = _evaluate(game, path.trial)
    near_B = _length(path.trial - path.aimed) <= _LARGEST_DETOUR * path.reached + _DETOUR_ALLOWANCE
    close_B = near_B & (residual_B <= torch.where(path.landing, residual_tol, curve_tol))
    arrived_B = path.running & close_B & path.landing
    crossed_B = close_B & ~path.landing & (path.trial[:, -1] > 0.0)
    accepted_B = path.running & close_B & ~path.landing & ~crossed_B
    most_B = torch.where(path.landing, _MOST_LANDINGS, _MOST_CORRECTIONS)
    corrected_B = ~close_B & near_B & (path.corrections < most_B) & (residual_B <= _LARGEST_RESIDUAL)
    stride_B = _next_stride(path, accepted_B, ~close_B & ~corrected_B)
    # the step onto the curve is known already: a short one is taken without an evaluation at its end
    unchecked_B = _length(newton_BU) <= _LARGEST_UNCHECKED * path.reached
    onto_BU = path.trial + torch.where(unchecked_B[:, None], newton_BU, 0.0)
    point_BU = torch.where((accepted_B | arrived_B)[:, None], onto_BU, path.point)
    path = _replaced(path, tangent=torch.where(accepted_B[:, None], tangent_BU, path.tangent), stride=stride_B)
    fresh = _choose(crossed_B, _back_to_target(path), _ahead(point_BU, path.tangent, stride_B))
    path = _replaced(
        path,
        running=path.running & ~arrived_B & (stride_B > _SHORTEST_STRIDE),
        num_steps=path.num_steps + path.running,
        arrived=path.arrived | arrived_B,
        point=point_BU,
    )
    return _with_trial(path, fresh, corrected_B, newton_BU, tangent_BU)


def _evaluate(game: NormalizedGame, at_BU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual [B], a step onto the curve at fixed s, and the unit tangent of the curve's level set.

    The tangent points to larger s where the Jacobian has a positive determinant and to smaller s where it has a
    negative one. By degree theory this is the direction in which a path from "nobody pays" passes through each of its
    pieces, so it stays right across corners, where a comparison with the previous tangent would not.
    """
    grown = NormalizedGame(game.log_base, game.values * at_BU[:, -1].exp()[:, None, None])
    response = respond(grown, at_BU[:, :-1], with_drift=True)
    assert response.drift is not None
    right_BJ2 = torch.stack([response.log_residual, response.drift], -1)
    solved_BJ2, sign_B = solve_small(response.jacobian, right_BJ2)
    # a singular Jacobian (a fold) gives infinities: large finite numbers keep the direction when made a unit vector
    solved_BJ2 = solved_BJ2.nan_to_num(0.0, 1e100, -1e100)
    zeros_B1 = torch.zeros_like(at_BU[:, :1])
    newton_BU = torch.cat([-solved_BJ2[..., 0], zeros_B1], 1)
    tangent_BU = torch.cat([-solved_BJ2[..., 1], zeros_B1 + 1.0], 1) * sign_B[:, None]
    return response.log_residual.abs().amax(1).nan_to_num(torch.inf), newton_BU, _unit(tangent_BU)


def _next_stride(path: PathState, accepted_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Lengthen the stride after few corrections, shorten it a little after many and much after a rejection."""
    grown_B = path.stride * torch.where(path.corrections <= 1, _LONGER, torch.where(path.corrections >= 3, 0.7, 1.0))
    shrunk_B = torch.minimum(path.stride, path.reached) * _SHORTER
    return torch.where(accepted_B, grown_B, torch.where(rejected_B, shrunk_B, path.stride))


def _with_trial(
    path: PathState, fresh: _Trial, corrected_B: Tensor, newton_BU: Tensor, tangent_BU: Tensor
) -> PathState:
    """Return the state with the fresh trial, or where the old one is corrected, with that moved towards the curve.

    A correction is orthogonal to the normal. Close to a corner (a token changed sides, and the next piece of the
    curve leads elsewhere) the trial is moved onto the next piece and a little along it: corrections orthogonal to the
    old tangent would hardly meet that piece.
    """
    turned_B = (tangent_BU * path.tangent).sum(1) < _CORNER_COSINE
    corner_B = corrected_B & turned_B & (path.reached < _CORNER_STRIDE) & (path.corrections == 0) & ~path.landing
    corrected_B1, corner_B1 = corrected_B[:, None], corner_B[:, None]
    normal_BU = torch.where(corner_B1, tangent_BU, path.normal)
    slide_B = (normal_BU * newton_BU).sum(1) / (normal_BU * tangent_BU).sum(1)
    correction_BU = (newton_BU - slide_B[:, None] * tangent_BU).nan_to_num_(0.0, 0.0, 0.0)
    beside_BU = path.trial + torch.where(corner_B, 2.0 * path.reached, 0.0)[:, None] * tangent_BU
    landing_B = torch.where(corrected_B, path.landing, fresh.landing)
    along_BU = torch.where(landing_B[:, None], _last_axis(path.trial), path.tangent)
    return _replaced(
        path,
        trial=torch.where(corrected_B1, beside_BU + correction_BU, fresh.at),
        aimed=torch.where(corrected_B1, torch.where(corner_B1, beside_BU, path.aimed), fresh.at),
        reached=torch.where(corrected_B, torch.where(corner_B, 4.0 * path.reached, path.reached), fresh.reached),
        normal=torch.where(corrected_B1, normal_BU, along_BU),
        landing=landing_B,
        corrections=torch.where(corrected_B, path.corrections + 1, 0),
    )


def _replaced(path: PathState, **parts: Tensor) -> PathState:
    """Return the state with some fields replaced, as `_replace` does, which torch 2.11 cannot compile."""
    return PathState(*[parts.get(name, part) for name, part in zip(PathState._fields, path, strict=True)])


def _ahead(point_BU: Tensor, tangent_BU: Tensor, stride_B: Tensor) -> _Trial:
    """Place a trial one stride along the tangent, or exactly at s = 1 where the stride would pass it."""
    log_factor_B, rise_B = point_BU[:, -1], tangent_BU[:, -1]
    landing_B = (log_factor_B + stride_B * rise_B >= 0.0) & (rise_B > 0.0)
    reached_B = torch.where(landing_B, -log_factor_B / rise_B, stride_B)
    return _placed(point_BU + reached_B[:, None] * tangent_BU, reached_B, landing_B)


def _back_to_target(path: PathState) -> _Trial:
    """Place a trial at s = 1, on the line from the point to a trial that a correction moved past it."""
    gone_BU = path.trial - path.point
    share_B = (-path.point[:, -1] / gone_BU[:, -1]).nan_to_num_(0.0, 0.0, 0.0)
    return _placed(path.point + share_B[:, None] * gone_BU, _length(gone_BU), torch.ones_like(path.landing))


def _placed(at_BU: Tensor, reached_B: Tensor, landing_B: Tensor) -> _Trial:
    at_BU[:, -1] = torch.where(landing_B, 0.0, at_BU[:, -1])  # log s exactly 0, whatever was rounded on the way
    return _Trial(at_BU, reached_B, landing_B)


def _choose(chosen_B: Tensor, one: _Trial, other: _Trial) -> _Trial:
    at_BU = torch.where(chosen_B[:, None], one.at, other.at)
    return _Trial(at_BU, torch.where(chosen_B, one.reached, other.reached), chosen_B | other.landing)


def _length(vector_BU: Tensor) -> Tensor:
    return vector_BU.square().sum(1).sqrt()


def _unit(vector_BU: Tensor) -> Tensor:
    """Return vectors of length 1; divided by their largest entry first, so that squares do not overflow."""
    vector_BU = vector_BU / vector_BU.abs().amax(1, keepdim=True)
    return (vector_BU / _length(vector_BU)[:, None]).nan_to_num_(0.0)


def _last_axis(like_BU: Tensor) -> Tensor:
    axis_BU = torch.zeros_like(like_BU)
    axis_BU[:, -1] = 1.0
    return axis_BU
