"""Solve games with every token kept, in float64 and in batches that fit a cache.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cage.game import Game
from cage.normalization import NormalizedGame, measure, scale
from cage.solution import Solution, SolutionBuilder, join

Find = Callable[[NormalizedGame], tuple[Tensor, Tensor]]
Finish = Callable[[NormalizedGame, Tensor], tuple[Tensor, Tensor]]

_FINISHABLE = 0.1  # below this residual the unchecked last step missed; above it the method did not arrive at all
ELEMENTS_PER_BATCH = {"cpu": 2**17, "cuda": 2**25}
_ELEMENTS_PER_BATCH_ELSEWHERE = 2**22


def solve_directly(
    game: Game, find: Find, *, tol: float, finish: Finish | None = None, max_steps: int = 0
) -> Solution:
    """Return the solution of a game at the thresholds that `find` returns.

    find: returns scaled thresholds [B, J] and evaluations [B] of normalized games in float64.
    tol: largest residual that counts as converged.
    finish: called once for the rows whose last step missed tol, with their thresholds as a start.
    max_steps: rows that took so many evaluations are not finished.
    """
    solutions = [_solve_batch(batch, find, tol, finish, max_steps).of(part) for part, batch in in_batches(game)]
    return solutions[0] if len(solutions) == 1 else join(game, solutions)


def in_batches(game: Game) -> list[tuple[Game, Game]]:
    """Return the batches of consecutive rows of a game, each in the caller's type and in float64.

    float64 whatever the caller's type: over a few hundred tokens it costs little more than float32, and values of a
    hundred agent temperatures leave float32 too few digits.
    """
    limit = ELEMENTS_PER_BATCH.get(game.values.device.type, _ELEMENTS_PER_BATCH_ELSEWHERE)
    size = max(1, limit // (max(1, game.num_principals) * game.num_tokens))
    if game.num_rows <= size:
        return [(game, to_float64(game))]
    split = partial(torch.split, split_size_or_sections=size)
    parts = zip(*map(split, (game.base_logprobs, game.values, game.row_temperatures)), strict=True)
    return [(batch, to_float64(batch)) for batch in (Game(*part) for part in parts)]


def to_float64(game: Game) -> Game:
    """Return a game in float64."""
    if game.values.dtype == torch.float64:
        return game
    return Game(game.base_logprobs.double(), game.values.double(), game.agent_temperature)


def _solve_batch(game: Game, find: Find, tol: float, finish: Finish | None, max_steps: int) -> Solution:
    measures = measure(game)
    scaled = scale(game, measures)
    thresholds_BJ, num_steps_B = find(scaled)
    builder = SolutionBuilder(game, measures)
    builder.set_thresholds(thresholds_BJ)
    late = ((builder.residual > tol) & (builder.residual < _FINISHABLE) & (num_steps_B < max_steps)).nonzero()[:, 0]
    if finish is not None and late.shape[0] > 0:
        found_RJ, more_R = finish(scaled.rows(late), thresholds_BJ[late])
        builder.set_thresholds(found_RJ, late)
        num_steps_B = num_steps_B.index_add(0, late, more_R)
    return builder.build(num_steps_B, tol)
