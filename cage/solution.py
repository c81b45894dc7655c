"""The answer to a batch of games, with the residuals and statuses that say whether to trust it.

Shapes: B rows (R of them in a block), J principals, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from cage.game import Game
from cage.normalization import Measures, excess, log_base, row_blocks

_NUMBERS = ("log_policy", "thresholds", "utilities", "residual")


class Status(IntEnum):
    """Say how the solve of one row ended.

    CONVERGED: the residual is at most the method's tolerance.
    MAX_STEPS: the steps ran out; the row holds the latest answer, and its residual says how far off that is.
    NOT_FINITE: no token can be drawn, or a number of the row's input is NaN or infinite; the row holds NaN.
    """

    CONVERGED = 0
    MAX_STEPS = 1
    NOT_FINITE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """One equilibrium per row, recomputed over all tokens from its thresholds.

    game: the game that was solved.
    log_policy: the agent's policy in logarithms, [B, V]; `-inf` for tokens that cannot be drawn.
    thresholds: each principal pays the part of a token's value above its threshold, in the unit of the values,
        [B, J].
    utilities: each principal's expected value minus its expected payment, in the unit of the values, [B, J].
    residual: max_j |E_pi[max(c_j - v_j, 0)] / tau - 1| [B]; 0 exactly at an equilibrium, without unit.
    status: `Status` values, [B].
    num_steps: evaluations of the row's game, [B]; for `Jacobi` and `GaussSeidel`, sweeps.

    Rows whose input is not finite hold NaN in every float field.
    """

    game: Game
    log_policy: Tensor
    thresholds: Tensor
    utilities: Tensor
    residual: Tensor
    status: Tensor
    num_steps: Tensor

    def of(self, game: Game) -> Solution:
        """Return this solution for the same game in the caller's type, with its numbers in that type."""
        if game is self.game:
            return self
        parts = {name: getattr(self, name).to(game.values) for name in _NUMBERS}
        return replace(self, game=game, **parts)

    @property
    def policy(self) -> Tensor:
        """The agent's policy as probabilities, [B, V]."""
        return self.log_policy.exp()

    @property
    def incentives(self) -> Tensor:
        """What every principal pays for every token, in the unit of the values, [B, J, V].

        0 for tokens that cannot be drawn. Computed at every access, because it is as large as the values.
        """
        drawable_BV = self.game.base_logprobs > -torch.inf
        excess_BJV = (self.game.values - self.thresholds[..., None]).clamp_min(0.0)
        return torch.where(drawable_BV[:, None], excess_BJV, 0.0)


def default_tolerance(game: Game) -> float:
    """Return the largest residual that counts as converged by default: 1e-9 in float64, 1e-4 in float32."""
    return 1e-9 if game.values.dtype == torch.float64 else 1e-4


class SolutionBuilder:
    """Compute policies and residuals of rows, over all their tokens, from the thresholds that a solver finds.

    game: the game to solve.
    measures: what `cage.normalization.measure` returned for it.

    Attributes, as of the latest `set_thresholds` of each row: log_policy [B, V]; thresholds [B, J], scaled; slack
    [B, J], which is E_pi[max(c_j - v_j, 0)] / tau.
    """

    def __init__(self, game: Game, measures: Measures) -> None:
        self.game, self.measures = game, measures
        self.log_policy = torch.empty_like(game.base_logprobs)
        self.thresholds = game.values.new_zeros(game.values.shape[:2])
        self.slack = torch.ones_like(self.thresholds)

    @property
    def residual(self) -> Tensor:
        """The residual of every row at its latest thresholds, [B]; see `Solution`."""
        if self.game.num_principals == 0:
            return torch.zeros_like(self.measures.temperature)
        return (self.slack - 1.0).abs().amax(1)

    def set_thresholds(self, thresholds_RJ: Tensor, rows: Tensor | None = None) -> None:
        """Recompute rows (an index [R]; None: all rows) at scaled thresholds [R, J], a block of rows at a time."""
        for block in row_blocks(self.game, thresholds_RJ.shape[0]):
            self._write_block(block if rows is None else rows[block], thresholds_RJ[block])

    def build(self, num_steps_B: Tensor, tol: float) -> Solution:
        """Return the solution at the latest thresholds; rows whose residual is at most tol have converged."""
        residual_B, finite_B = self.residual, self.measures.finite
        converged_B = torch.where(residual_B <= tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
        thresholds_BJ = self.measures.thresholds(self.thresholds)
        if not self.measures.unmasked:
            self.log_policy.masked_fill_(~finite_B[:, None], torch.nan)
        return Solution(
            game=self.game,
            log_policy=self.log_policy,
            thresholds=thresholds_BJ,
            utilities=thresholds_BJ - self.slack * self.measures.temperature[:, None],
            residual=torch.where(finite_B, residual_B, torch.nan),
            status=torch.where(finite_B, converged_B, int(Status.NOT_FINITE)),
            num_steps=num_steps_B,
        )

    def _write_block(self, rows: slice | Tensor, thresholds_RJ: Tensor) -> None:
        price_R1 = self.measures.temperature[rows, None].reciprocal()
        excess_RJV = excess(self.game, self.measures, rows, thresholds_RJ)
        paid_RJV = excess_RJV.clamp_min(0.0)
        logits_RV = log_base(self.game, self.measures, rows)
        # in the principals' order: a fused sum could round a row differently in another batch
        for paid_RV in paid_RJV.unbind(1):
            logits_RV = logits_RV.addcmul_(paid_RV, price_R1)
        logits_RV = logits_RV.sub_(logits_RV.amax(1, keepdim=True))
        weights_RV = logits_RV.exp()
        total_R1 = weights_RV.sum(1, keepdim=True)
        burden_RJV = torch.sub(paid_RJV, excess_RJV, out=paid_RJV).mul_(weights_RV[:, None])
        self.slack[rows] = burden_RJV.sum(2).mul_(price_R1 / total_R1)
        self.thresholds[rows] = thresholds_RJ
        if isinstance(rows, slice):
            torch.sub(logits_RV, total_R1.log(), out=self.log_policy[rows])
        else:
            self.log_policy.index_copy_(0, rows, logits_RV.sub_(total_R1.log()))


def join(game: Game, solutions: Sequence[Solution]) -> Solution:
    """Return the solution of a game whose consecutive rows were solved separately."""
    names = (*_NUMBERS, "status", "num_steps")
    return Solution(game=game, **{name: torch.cat([getattr(part, name) for part in solutions]) for name in names})
