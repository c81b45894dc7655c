"""Jacobi and Gauss-Seidel with exact best responses: the paper's Algorithm 1 with its inner problem solved exactly.

For comparison: they find the same equilibrium where there is one, but may take hundreds of sweeps.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cage.direct import solve_directly
from cage.game import Game
from cage.normalization import NormalizedGame
from cage.response import nobody_pays, respond
from cage.rows import iterate
from cage.solution import Solution, default_tolerance

Sweep = Callable[[NormalizedGame, Tensor], Tensor]

_RESPONSE_STEPS = 200  # more than bisection alone needs in float64, so the loop ends at a fixed point


@dataclass(frozen=True, slots=True)
class Jacobi:
    """Let every principal respond to the others' previous offers at the same time (CAGE, Algorithm 1).

    tol: largest residual that counts as converged; None takes 1e-9 in float64 and 1e-4 in float32.
    max_steps: most sweeps of one row. A row that needs more has status MAX_STEPS and its latest answer.
    start_seed: None starts where nobody pays. A number draws every first threshold uniformly between the principal's
        lowest value and the threshold at which it pays nothing: with three or more principals other starts may end
        at other equilibria.
    """

    tol: float | None = None
    max_steps: int = 100
    start_seed: int | None = None

    def solve(self, game: Game) -> Solution:
        """Return the solution at the last sweep; its num_steps counts sweeps."""
        return _solve(game, _jacobi_sweep, self.tol, self.max_steps, self.start_seed)


@dataclass(frozen=True, slots=True)
class GaussSeidel:
    """Let the principals respond one after another, each to the newest offers of the others.

    tol: largest residual that counts as converged; None takes 1e-9 in float64 and 1e-4 in float32.
    max_steps: most sweeps of one row. A row that needs more has status MAX_STEPS and its latest answer.
    """

    tol: float | None = None
    max_steps: int = 100

    def solve(self, game: Game) -> Solution:
        """Return the solution at the last sweep; its num_steps counts sweeps."""
        return _solve(game, _gauss_seidel_sweep, self.tol, self.max_steps)


def best_response(game: NormalizedGame, thresholds_BJ: Tensor, principal: int) -> Tensor:
    """Return the scaled threshold [B] of one principal that is optimal against the others' offers.

    thresholds_BJ: scaled thresholds of all principals; that of the principal itself is ignored.

    Newton on the logarithm of E_pi[max(c - v, 0)], which increases in c, inside a bracket that only shrinks: a step
    that leaves the bracket is replaced by a bisection, so it always converges.
    """
    log_offer_BV = game.log_base.clone()
    for j in range(thresholds_BJ.shape[1]):
        if j != principal:
            log_offer_BV += (game.values[:, j] - thresholds_BJ[:, j, None]).clamp_min_(0.0)
    values_BV = game.values[:, principal]
    # the threshold if it pays nothing; that is the answer where it is not below the highest value, which is 0
    outside_B = (torch.softmax(log_offer_BV, -1) * values_BV).sum(-1) + 1.0
    low_B, high_B = values_BV.amin(-1), torch.zeros_like(outside_B)
    point_B = high_B
    for _ in range(_RESPONSE_STEPS):
        residual_B, slope_B = _response_residual(log_offer_BV, values_BV, point_B)
        low_B = torch.where(residual_B < 0.0, point_B, low_B)
        high_B = torch.where(residual_B > 0.0, point_B, high_B)
        newton_B = point_B - residual_B / slope_B
        inside_B = (newton_B > low_B) & (newton_B < high_B)
        next_B = torch.where(inside_B, newton_B, 0.5 * (low_B + high_B))
        next_B = torch.where(residual_B == 0.0, point_B, next_B)
        if bool((next_B == point_B).all()):
            break
        point_B = next_B
    return torch.where(outside_B >= 0.0, outside_B, point_B)


class _Sweeping(NamedTuple):
    running: Tensor
    num_sweeps: Tensor
    thresholds: Tensor


def _response_residual(log_offer_BV: Tensor, values_BV: Tensor, point_B: Tensor) -> tuple[Tensor, Tensor]:
    excess_BV = values_BV - point_B[:, None]
    policy_BV = torch.softmax(log_offer_BV + excess_BV.clamp_min(0.0), -1)
    slack_B = (policy_BV * (-excess_BV).clamp_min(0.0)).sum(-1)
    below_B = (policy_BV * (excess_BV < 0.0)).sum(-1)
    return slack_B.log(), below_B / slack_B + (policy_BV * (excess_BV > 0.0)).sum(-1)


def _jacobi_sweep(game: NormalizedGame, thresholds_BJ: Tensor) -> Tensor:
    return torch.stack([best_response(game, thresholds_BJ, j) for j in range(thresholds_BJ.shape[1])], 1)


def _gauss_seidel_sweep(game: NormalizedGame, thresholds_BJ: Tensor) -> Tensor:
    thresholds_BJ = thresholds_BJ.clone()
    for j in range(thresholds_BJ.shape[1]):
        thresholds_BJ[:, j] = best_response(game, thresholds_BJ, j)
    return thresholds_BJ


def _solve(game: Game, sweep: Sweep, tol: float | None, max_steps: int, start_seed: int | None = None) -> Solution:
    tol = default_tolerance(game) if tol is None else tol
    settle = partial(_settle, sweep=sweep, aim=tol / 2, max_steps=max_steps, start_seed=start_seed)
    return solve_directly(game, settle, tol=tol)


def _start(game: NormalizedGame, seed: int | None) -> Tensor:
    """First thresholds [B, J]: where nobody pays, or drawn."""
    highest_BJ = nobody_pays(game)
    if seed is None:
        return highest_BJ
    lowest_BJ = game.values.amin(-1)
    drawn_BJ = torch.rand(highest_BJ.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lowest_BJ + drawn_BJ.to(lowest_BJ) * (highest_BJ - lowest_BJ)


def _settle(
    game: NormalizedGame, *, sweep: Sweep, aim: float, max_steps: int, start_seed: int | None
) -> tuple[Tensor, Tensor]:
    state = _Sweeping(
        running=game.log_base[:, 0] < torch.inf,
        num_sweeps=torch.zeros_like(game.log_base[:, 0], dtype=torch.int32),
        thresholds=_start(game, start_seed),
    )
    if game.values.shape[1] > 0:
        state = iterate(partial(_step, sweep=sweep, aim=aim), game, state, max_steps=max_steps)
    return state.thresholds, state.num_sweeps


def _step(game: NormalizedGame, state: _Sweeping, *, sweep: Sweep, aim: float) -> _Sweeping:
    swept_BJ = torch.where(state.running[:, None], sweep(game, state.thresholds), state.thresholds)
    residual_B = respond(game, swept_BJ).log_residual.abs().amax(1)
    return _Sweeping(state.running & ~(residual_B <= aim), state.num_sweeps + state.running, swept_BJ)
