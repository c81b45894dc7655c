"""Newton on the thresholds: the default method, and its form with a fixed number of steps.

Newton works on the logarithms of the residuals. The residuals themselves grow without bound in the thresholds, and
Newton on them fails where values are many agent temperatures; their logarithms are close to linear there
(docs/mathematics.md, sections 4 and 6).

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

from cage.continuation import PathState, advance, follow_path, start_path
from cage.direct import solve_directly, to_float64
from cage.game import Game
from cage.normalization import Measures, NormalizedGame, measure, scale
from cage.pooling import is_worth_pooling, solve_pooled
from cage.response import newton, nobody_pays
from cage.rows import iterate
from cage.solution import Solution, SolutionBuilder, Status, default_tolerance

ALWAYS_UNIQUE = 2  # up to so many principals have exactly one equilibrium, whatever their values
_DIRECT_STEPS = 32  # Newton steps before a row that has not settled follows the path instead
_LONGEST_STEP = 10.0  # agent temperatures; beyond it too many tokens change sides for a linear model to hold
_TURNING_BACK = 0.7  # of the last step is the most by which a threshold may go back; below 1 ends cycles
_QUADRATIC = 0.3  # Newton squares small residuals; a margin below 1, because the answer is checked anyway

# Options of inductor, torch's compiler. They change which kernels are fused, never what is computed.
_Fusion = tuple[tuple[str, int], ...]
_FUSED: _Fusion = (
    ("unroll_reductions_threshold", 1),
)  # keep a sum over principals as a reduction, in the kernel that needs it
_COMPUTED_AGAIN: _Fusion = (
    ("realize_opcount_threshold", 60),
    ("realize_reads_threshold", 8),
)  # recompute a value in each kernel instead of storing it
_FEW = 4  # principals; with more, recomputing adds half a minute of compilation and saves one kernel


@dataclass(frozen=True, slots=True)
class ThresholdNewton:
    """Newton on the log-residuals of the thresholds, and along a path in agent_temperature where that is needed.

    tol: largest residual (see `Solution`) that counts as converged; None takes 1e-9 in float64 and 1e-4 in float32.
    max_steps: most evaluations of one row. A row that needs more has status MAX_STEPS and its latest answer.
    """

    tol: float | None = None
    max_steps: int = 10_000

    def solve(self, game: Game) -> Solution:
        """Return one equilibrium per row: the one of least intervention (docs/mathematics.md, "Which equilibrium").

        Never raises for the numbers in a game: `Solution.status` reports rows that are not finite or did not
        converge. The bits of a row do not depend on the other rows of its batch (on a CPU, with one thread).
        """
        tol = default_tolerance(game) if self.tol is None else self.tol
        find = partial(find_thresholds, aim=tol / 2, max_steps=self.max_steps)
        if is_worth_pooling(game):
            return solve_pooled(game, measure(game), find, tol=tol, max_steps=self.max_steps)
        return solve_directly(game, find, tol=tol, finish=find, max_steps=self.max_steps)


@dataclass(frozen=True, slots=True)
class FixedStepNewton:
    """`ThresholdNewton` in a fixed number of steps, so that a CUDA graph can capture it.

    No value is read back from the device, so the host never waits and the sequence of operations is always the same.

    num_steps: evaluations of every row. A row that needs more, or a tighter tolerance along its path, has status
        MAX_STEPS. A row that has converged stays as it is, so a larger num_steps changes none of its bits.
    tol: as in `ThresholdNewton`.
    compiles: run through torch.compile. Worth it on a GPU, where launching each of the forty small operations of a
        step takes longer than computing it.
    """

    num_steps: int = 12
    tol: float | None = None
    compiles: bool = False

    def solve(self, game: Game) -> Solution:
        """Return one equilibrium per row, the same one as `ThresholdNewton`."""
        tol = default_tolerance(game) if self.tol is None else self.tol
        is_unique = game.num_principals <= ALWAYS_UNIQUE
        parts: tuple[Callable[..., Any], ...] = (_begin, _one_newton_step if is_unique else _one_path_step, _end)
        begin, step, end = (_compiled(part, _fusion(game)) for part in parts) if self.compiles else parts
        game_f64, measures, scaled, state = begin(game)
        if game.num_principals:
            for _ in range(self.num_steps):
                state = step(scaled, state, tol)
        thresholds_BJ = state.point if is_unique else state.point[:, :-1]
        is_under_way_B = state.running if is_unique else ~state.arrived
        solution: Solution = end(game_f64, measures, thresholds_BJ, state.num_steps, is_under_way_B, tol)
        return solution.of(game)


def solve(game: Game) -> Solution:
    """Return one equilibrium per row, by the default method: `ThresholdNewton` with its default tolerance."""
    return ThresholdNewton().solve(game)


@cache
def _compiled(function: Callable[..., Any], fusion: _Fusion) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, options=dict(fusion))


def _fusion(game: Game) -> _Fusion:
    """Choose options for few, large kernels: along a path, launching a kernel takes longer than its computation."""
    if game.num_principals <= ALWAYS_UNIQUE:
        return ()
    return _FUSED if game.num_principals > _FEW else _FUSED + _COMPUTED_AGAIN


def _begin(game: Game) -> tuple[Game, Measures, NormalizedGame, _NewtonState | PathState]:
    game_f64 = to_float64(game)
    measures = measure(game_f64, reads_back=False)
    scaled = scale(game_f64, measures)
    if game.num_principals <= ALWAYS_UNIQUE:
        return game_f64, measures, scaled, _start(scaled, nobody_pays(scaled))
    return game_f64, measures, scaled, start_path(scaled)


def _one_newton_step(game: NormalizedGame, state: _NewtonState, tol: float) -> _NewtonState:
    return _step(game, state, residual_tol=tol / 2)


def _one_path_step(game: NormalizedGame, path: PathState, tol: float) -> PathState:
    return advance(game, path, residual_tol=_last_step_tol(tol / 2))


def _end(
    game_f64: Game, measures: Measures, thresholds_BJ: Tensor, num_steps_B: Tensor, is_under_way_B: Tensor, tol: float
) -> Solution:
    builder = SolutionBuilder(game_f64, measures)
    builder.set_thresholds(thresholds_BJ)
    solution = builder.build(num_steps_B, tol)
    if not game_f64.num_principals:
        return solution
    # A small residual is not enough: with more steps the row would go on and change its last bits, so its answer
    # would depend on num_steps.
    is_unfinished_B = is_under_way_B & (solution.status == int(Status.CONVERGED))
    return replace(solution, status=torch.where(is_unfinished_B, int(Status.MAX_STEPS), solution.status))


def find_thresholds(
    game: NormalizedGame, near_BJ: Tensor | None = None, *, aim: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Return scaled thresholds [B, J] and the number of evaluations of each row [B].

    near_BJ: thresholds that are known to be close to the answer, as a start; None starts where nobody pays.
    aim: the residual to reach. The last step is taken without evaluating at its end, so a row may miss the aim and
        the caller has to check the answer. From near_BJ the row is evaluated once more than needed instead.
    max_steps: most evaluations of one row.

    One or two principals have one equilibrium, so any way to it will do: Newton first, and the path for rows where
    Newton stalls. With three or more principals the path decides which equilibrium is meant.
    """
    num_rows, num_principals = game.values.shape[:2]
    if num_principals == 0 or num_rows == 0:
        return game.values.new_zeros((num_rows, num_principals)), _no_steps(game)
    if num_principals > ALWAYS_UNIQUE and near_BJ is None:
        return _follow(game, aim, max_steps)
    start_BJ = nobody_pays(game) if near_BJ is None else near_BJ
    residual_tol = _last_step_tol(aim) if near_BJ is None else aim
    state = _iterate_newton(game, start_BJ, residual_tol, min(_DIRECT_STEPS, max_steps))
    thresholds_BJ, num_steps_B = state.point, state.num_steps
    stalled = state.running.nonzero()[:, 0]
    if stalled.shape[0] and max_steps > _DIRECT_STEPS:
        found_RJ, more_R = _follow(game.rows(stalled), aim, max_steps - _DIRECT_STEPS)
        thresholds_BJ = thresholds_BJ.index_copy(0, stalled, found_RJ)
        num_steps_B = num_steps_B.index_add(0, stalled, more_R)
    return thresholds_BJ, num_steps_B


class _NewtonState(NamedTuple):
    """The state of Newton's iteration.

    running [B], num_steps [B]: as `iterate` wants them.
    point [B, J]: scaled thresholds; moved [B, J]: the last step, which brought them there.
    floor [B, J]: each principal's lowest value, below which no threshold can be a solution.
    """

    running: Tensor
    num_steps: Tensor
    point: Tensor
    moved: Tensor
    floor: Tensor


def _iterate_newton(game: NormalizedGame, start_BJ: Tensor, residual_tol: float, max_steps: int) -> _NewtonState:
    return iterate(partial(_step, residual_tol=residual_tol), game, _start(game, start_BJ), max_steps=max_steps)


def _start(game: NormalizedGame, start_BJ: Tensor) -> _NewtonState:
    num_steps_B = _no_steps(game)
    return _NewtonState(num_steps_B == 0, num_steps_B, start_BJ, torch.zeros_like(start_BJ), game.values.amin(-1))


def _step(game: NormalizedGame, state: _NewtonState, *, residual_tol: float) -> _NewtonState:
    """Take one Newton step in every running row; a row ends one step after its residuals are at most residual_tol.

    A threshold that turns back goes less far than it came, which ends cycles across corners of the residuals.
    """
    running, num_steps_B, point_BJ, moved_BJ, floor_BJ = state
    log_residual_BJ, step_BJ = newton(game, point_BJ)
    longest_BJ = torch.where(step_BJ * moved_BJ < 0.0, moved_BJ.abs().mul_(_TURNING_BACK), _LONGEST_STEP)
    # NaN comes from thresholds at which every token is paid for (the residual is 0, its logarithm -inf): go up
    step_BJ = torch.clamp(step_BJ.nan_to_num_(1.0), -longest_BJ, longest_BJ)
    # at the lowest value the log-residual is -inf, so the distance to it is at most halved; no solution is above
    # 1, because it is at most E_pi[v_j] + 1 and values are at most 0
    next_BJ = torch.maximum(point_BJ + step_BJ, torch.lerp(point_BJ, floor_BJ, 0.5)).clamp_max_(1.0)
    next_BJ = torch.where(running[:, None], next_BJ, point_BJ)
    still = running & ~(log_residual_BJ.abs().amax(1) <= residual_tol)
    return _NewtonState(still, num_steps_B + running, next_BJ, next_BJ - point_BJ, floor_BJ)


def _follow(game: NormalizedGame, aim: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Follow the path in float64: float32 cannot tell a turn of the path from rounding."""
    thresholds_BJ, num_steps_B = follow_path(
        game.to(torch.float64), residual_tol=_last_step_tol(aim), max_steps=max_steps
    )
    return thresholds_BJ.to(game.values.dtype), num_steps_B


def _last_step_tol(aim: float) -> float:
    """Return the largest residual from which one more Newton step reaches the aim."""
    return _QUADRATIC * math.sqrt(aim)


def _no_steps(game: NormalizedGame) -> Tensor:
    return torch.zeros(game.values.shape[0], dtype=torch.int32, device=game.values.device)
