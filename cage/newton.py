"""Newton on the thresholds, the default method.

Shapes: B rows, J principals, K tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cage.continuation import follow_path
from cage.game import Game
from cage.pooling import pays_off, solve_pooled
from cage.response import newton_step, nobody_pays, respond
from cage.rows import iterate
from cage.scaled import ScaledGame, measure
from cage.solution import Solution, default_tolerance
from cage.whole import solve_whole

_DIRECT_STEPS = 20
_LONGEST_STEP = 6.0  # agent temperatures; further the residuals have changed sides too often to be extrapolated
_SHORTEST_LENGTH = 0.25  # at a corner no length may do; going across shows the other side


@dataclass(frozen=True, slots=True)
class ThresholdNewton:
    """Newton on the log-residuals of the thresholds, and along a path in agent_temperature where that is needed.

    tol: largest residual that counts as converged; None takes 1e-9 in float64 and 1e-4 in float32.
    max_steps: most evaluations of one row.
    """

    tol: float | None = None
    max_steps: int = 2000

    def solve(self, game: Game) -> Solution:
        """Return one equilibrium a row: the one of least intervention (docs/mathematics.md, "Which equilibrium")."""
        tol = default_tolerance(game) if self.tol is None else self.tol
        find = partial(find_thresholds, aim=tol / 2, max_steps=self.max_steps)
        if pays_off(game):
            return solve_pooled(game, measure(game), find, tol=tol, max_steps=self.max_steps)
        return solve_whole(game, find, tol=tol)


def find_thresholds(
    game: ScaledGame, near_BJ: Tensor | None = None, *, aim: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Return scaled thresholds [B, J] with residuals of at most aim where that was reached, and evaluations [B].

    One or two principals have one equilibrium, so any way to it will do: straight first, along the path where
    that stalls. With three or more the path decides which equilibrium is meant. Thresholds known to be close
    (near) are used as a start.
    """
    num_rows, num_principals = game.values.shape[:2]
    if num_principals == 0 or num_rows == 0:
        return game.values.new_zeros((num_rows, num_principals)), _no_steps(game)
    if num_principals > 2 and near_BJ is None:
        return _follow(game, aim, max_steps)
    start_BJ = nobody_pays(game) if near_BJ is None else near_BJ
    state = _go_straight(game, start_BJ, aim, min(_DIRECT_STEPS, max_steps))
    thresholds_BJ, num_steps_B = state.point, state.num_steps
    stalled = (~(state.worst <= aim)).nonzero()[:, 0]
    if stalled.shape[0] and max_steps > _DIRECT_STEPS:
        found_RJ, more_R = _follow(game.rows(stalled), aim, max_steps - _DIRECT_STEPS)
        thresholds_BJ = thresholds_BJ.index_copy(0, stalled, found_RJ)
        num_steps_B = num_steps_B.index_add(0, stalled, more_R)
    return thresholds_BJ, num_steps_B


class _Straight(NamedTuple):
    """point is where the row stands and trial the next to look at, length times direction away."""

    running: Tensor
    num_steps: Tensor
    point: Tensor
    worst: Tensor
    merit: Tensor
    bar: Tensor
    trial: Tensor
    direction: Tensor
    length: Tensor
    floor: Tensor


def _go_straight(game: ScaledGame, start_BJ: Tensor, aim: float, max_steps: int) -> _Straight:
    ones_B = torch.ones_like(start_BJ[:, 0])
    infinite_B = torch.full_like(ones_B, torch.inf)
    state = _Straight(
        running=ones_B > 0.0,
        num_steps=_no_steps(game),
        point=start_BJ,
        worst=infinite_B,
        merit=infinite_B,
        bar=infinite_B,
        trial=start_BJ,
        direction=torch.zeros_like(start_BJ),
        length=ones_B,
        floor=game.values.amin(-1),
    )
    return iterate(partial(_step, aim=aim), game, state, max_steps=max_steps)


def _step(game: ScaledGame, state: _Straight, *, aim: float) -> _Straight:
    """Look at the trial: move there if it beats the worse of the last two points, else try half as far, twice."""
    response = respond(game, state.trial)
    merit_B = response.log_residual.square().sum(-1).sqrt()
    better_B = merit_B < state.bar * (1.0 - 1e-4 * state.length)
    moves_B = state.running & (better_B | ((state.length <= _SHORTEST_LENGTH) & (merit_B < torch.inf)))
    step_BJ = newton_step(response)
    step_BJ = step_BJ * (_LONGEST_STEP / step_BJ.abs().amax(1, keepdim=True)).clamp_max(1.0)
    direction_BJ = torch.where(moves_B[:, None], step_BJ, state.direction)
    length_B = torch.where(moves_B, 1.0, (state.length * 0.5).clamp_min(_SHORTEST_LENGTH))
    point_BJ = torch.where(moves_B[:, None], state.trial, state.point)
    worst_B = torch.where(moves_B, response.log_residual.abs().amax(1), state.worst)
    trial_BJ = point_BJ + length_B[:, None] * direction_BJ
    trial_BJ = torch.maximum(trial_BJ, 0.5 * (point_BJ + state.floor)).clamp_max(1.0)
    return state._replace(
        running=state.running & (worst_B > aim),
        num_steps=state.num_steps + state.running,
        point=point_BJ,
        worst=worst_B,
        merit=torch.where(moves_B, merit_B, state.merit),
        bar=torch.where(moves_B, _bar(state.merit, merit_B), state.bar),
        trial=trial_BJ,
        direction=direction_BJ,
        length=length_B,
    )


def _bar(merit_B: Tensor, newer_B: Tensor) -> Tensor:
    return torch.where(merit_B < torch.inf, torch.maximum(merit_B, newer_B), newer_B)


def _follow(game: ScaledGame, aim: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Follow the path in float64, where its turns are told from rounding."""
    thresholds_BJ, num_steps_B = follow_path(game.to(torch.float64), aim=aim, max_steps=max_steps)
    return thresholds_BJ.to(game.values.dtype), num_steps_B


def _no_steps(game: ScaledGame) -> Tensor:
    return torch.zeros(game.values.shape[0], dtype=torch.int32, device=game.values.device)
