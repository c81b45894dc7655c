"""Newton on the thresholds, the default method.

Shapes: B rows, J principals, K tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cage.continuation import Walk, follow_path, set_out, step_on
from cage.direct import solve_directly, widened
from cage.game import Game
from cage.normalization import Measures, NormalizedGame, measure, scale
from cage.pooling import pays_off, solve_pooled
from cage.response import newton, nobody_pays
from cage.rows import iterate
from cage.solution import Draft, Solution, Status, default_tolerance

ALWAYS_UNIQUE = 2  # so many principals have one equilibrium, whatever their values
_DIRECT_STEPS = 32
_LONGEST_STEP = 10.0  # agent temperatures; further the residuals have changed sides too often to be extrapolated
_TURNING_BACK = 0.7  # of the last step
_QUADRATIC = 0.3  # times the root of what is aimed at; the answer is checked anyway

# options of torch's compiler, inductor
_Fusion = tuple[tuple[str, int], ...]
_FUSED: _Fusion = (("unroll_reductions_threshold", 1),)  # a sum over principals stays beside what it is for
_COMPUTED_AGAIN: _Fusion = (("realize_opcount_threshold", 60), ("realize_reads_threshold", 8))  # rather than kept
_FEW = 4  # principals; for more the compiler takes half a minute to spare a kernel


@dataclass(frozen=True, slots=True)
class ThresholdNewton:
    """Newton on the log-residuals of the thresholds, and along a path in agent_temperature where that is needed.

    tol: largest residual that counts as converged; None takes 1e-9 in float64 and 1e-4 in float32.
    max_steps: most evaluations of one row.
    """

    tol: float | None = None
    max_steps: int = 10_000

    def solve(self, game: Game) -> Solution:
        """Return one equilibrium a row: the one of least intervention (docs/mathematics.md, "Which equilibrium")."""
        tol = default_tolerance(game) if self.tol is None else self.tol
        find = partial(find_thresholds, aim=tol / 2, max_steps=self.max_steps)
        if pays_off(game):
            return solve_pooled(game, measure(game), find, tol=tol, max_steps=self.max_steps)
        return solve_directly(game, find, tol=tol, finish=find, max_steps=self.max_steps)


@dataclass(frozen=True, slots=True)
class FixedStepNewton:
    """The same without ever looking at a number, so that a CUDA graph can hold it.

    Every row takes num_steps evaluations; one that needs more, or more care along the path, has status MAX_STEPS,
    and with more steps no bit of the others changes. tol: as in `ThresholdNewton`. compiles: run compiled, for a
    GPU, where the forty small operations of a step cost as much as large ones.
    """

    num_steps: int = 12
    tol: float | None = None
    compiles: bool = False

    def solve(self, game: Game) -> Solution:
        """Return the equilibrium of each row, that of `ThresholdNewton`."""
        tol = default_tolerance(game) if self.tol is None else self.tol
        is_straight = game.num_principals <= ALWAYS_UNIQUE
        parts: tuple[Callable[..., Any], ...] = (_begin, _straight_on if is_straight else _walk_on, _end)
        begin, step, end = (_compiled(part, _fusion(game)) for part in parts) if self.compiles else parts
        whole, measures, scaled, state = begin(game)
        if game.num_principals:
            for _ in range(self.num_steps):
                state = step(scaled, state, tol)
        thresholds_BJ = state.point if is_straight else state.point[:, :-1]
        is_under_way_B = state.running if is_straight else ~state.arrived
        solution: Solution = end(whole, measures, thresholds_BJ, state.num_steps, is_under_way_B, tol)
        return solution.of(game)


@cache
def _compiled(function: Callable[..., Any], fusion: _Fusion) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, options=dict(fusion))


def _fusion(game: Game) -> _Fusion:
    """For a walk: starting a kernel takes longer than what it computes, so that there should be few of them."""
    if game.num_principals <= ALWAYS_UNIQUE:
        return ()
    return _FUSED if game.num_principals > _FEW else _FUSED + _COMPUTED_AGAIN


def _begin(game: Game) -> tuple[Game, Measures, NormalizedGame, _Straight | Walk]:
    whole = widened(game)
    measures = measure(whole, looks=False)
    scaled = scale(whole, measures)
    if game.num_principals <= ALWAYS_UNIQUE:
        return whole, measures, scaled, _set_out(scaled, nobody_pays(scaled))
    return whole, measures, scaled, set_out(scaled)


def _straight_on(game: NormalizedGame, state: _Straight, tol: float) -> _Straight:
    return _step(game, state, enough=tol / 2)


def _walk_on(game: NormalizedGame, walk: Walk, tol: float) -> Walk:
    return step_on(game, walk, enough=_nearly(tol / 2))


def _end(
    whole: Game, measures: Measures, thresholds_BJ: Tensor, num_steps_B: Tensor, is_under_way_B: Tensor, tol: float
) -> Solution:
    draft = Draft(whole, measures)
    draft.write(thresholds_BJ)
    solution = draft.solution(num_steps_B, tol)
    if not whole.num_principals:
        return solution
    # close enough is not enough: with more steps the row would go on, to other last bits
    is_unfinished_B = is_under_way_B & (solution.status == int(Status.CONVERGED))
    return replace(solution, status=torch.where(is_unfinished_B, int(Status.MAX_STEPS), solution.status))


def find_thresholds(
    game: NormalizedGame, near_BJ: Tensor | None = None, *, aim: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Return scaled thresholds [B, J], where possible with residuals of at most aim, and evaluations [B].

    The last step is not looked at, so a row may miss: the answer has to be checked. Thresholds known to be close
    (near) are used as a start, and then the last step is one more than needed.

    One or two principals have one equilibrium, so any way to it will do: straight first, along the path where
    that stalls. With three or more the path decides which equilibrium is meant.
    """
    num_rows, num_principals = game.values.shape[:2]
    if num_principals == 0 or num_rows == 0:
        return game.values.new_zeros((num_rows, num_principals)), _no_steps(game)
    if num_principals > ALWAYS_UNIQUE and near_BJ is None:
        return _follow(game, aim, max_steps)
    start_BJ = nobody_pays(game) if near_BJ is None else near_BJ
    enough = _nearly(aim) if near_BJ is None else aim
    state = _go_straight(game, start_BJ, enough, min(_DIRECT_STEPS, max_steps))
    thresholds_BJ, num_steps_B = state.point, state.num_steps
    stalled = state.running.nonzero()[:, 0]
    if stalled.shape[0] and max_steps > _DIRECT_STEPS:
        found_RJ, more_R = _follow(game.rows(stalled), aim, max_steps - _DIRECT_STEPS)
        thresholds_BJ = thresholds_BJ.index_copy(0, stalled, found_RJ)
        num_steps_B = num_steps_B.index_add(0, stalled, more_R)
    return thresholds_BJ, num_steps_B


class _Straight(NamedTuple):
    """moved: the last step taken; floor: the lowest values."""

    running: Tensor
    num_steps: Tensor
    point: Tensor
    moved: Tensor
    floor: Tensor


def _go_straight(game: NormalizedGame, start_BJ: Tensor, enough: float, max_steps: int) -> _Straight:
    return iterate(partial(_step, enough=enough), game, _set_out(game, start_BJ), max_steps=max_steps)


def _set_out(game: NormalizedGame, start_BJ: Tensor) -> _Straight:
    num_steps_B = _no_steps(game)
    return _Straight(num_steps_B == 0, num_steps_B, start_BJ, torch.zeros_like(start_BJ), game.values.amin(-1))


def _step(game: NormalizedGame, state: _Straight, *, enough: float) -> _Straight:
    """Take a Newton step; one that turns back goes less far than the last, which ends the cycles across corners.

    The row ends one step after its residuals are small enough.
    """
    running, num_steps_B, point_BJ, moved_BJ, floor_BJ = state
    log_residual_BJ, step_BJ = newton(game, point_BJ)
    longest_BJ = torch.where(step_BJ * moved_BJ < 0.0, moved_BJ.abs().mul_(_TURNING_BACK), _LONGEST_STEP)
    # a step that is no number comes of thresholds at which everything is paid for
    step_BJ = torch.clamp(step_BJ.nan_to_num_(1.0), -longest_BJ, longest_BJ)
    next_BJ = torch.maximum(point_BJ + step_BJ, torch.lerp(point_BJ, floor_BJ, 0.5)).clamp_max_(1.0)
    next_BJ = torch.where(running[:, None], next_BJ, point_BJ)
    still = running & ~(log_residual_BJ.abs().amax(1) <= enough)
    return _Straight(still, num_steps_B + running, next_BJ, next_BJ - point_BJ, floor_BJ)


def _follow(game: NormalizedGame, aim: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Follow the path in float64, where its turns are told from rounding."""
    thresholds_BJ, num_steps_B = follow_path(game.to(torch.float64), enough=_nearly(aim), max_steps=max_steps)
    return thresholds_BJ.to(game.values.dtype), num_steps_B


def _nearly(aim: float) -> float:
    """Residuals from which one more step arrives at what is aimed at."""
    return _QUADRATIC * math.sqrt(aim)


def _no_steps(game: NormalizedGame) -> Tensor:
    return torch.zeros(game.values.shape[0], dtype=torch.int32, device=game.values.device)
