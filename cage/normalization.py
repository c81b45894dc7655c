"""A game in its natural unit: values in agent temperatures, measured down from each principal's best token.

Equilibria depend on values only through differences in agent temperatures, so solvers see one unit and no offsets.

Shapes: B rows (R of them in a block), J principals, V tokens (K in a game with pooled tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cage.game import Game

LOWEST_VALUE = -1e30  # lower values are clamped to it: times a number of tokens it is still finite in float32
_ALL = slice(None)
ELEMENTS_PER_BLOCK = {"cpu": 2**19, "cuda": 2**24}  # what fits a CPU's caches; little beside a GPU's memory
_ELEMENTS_PER_BLOCK_ELSEWHERE = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class NormalizedGame:
    """What the solvers iterate on: finite numbers only, except `-inf` in log_base for tokens that cannot be drawn.

    log_base: the base policy's log-probabilities, normalised, [B, K].
    values: (v - max v) / tau, so that none is above 0, [B, J, K].
    """

    log_base: Tensor
    values: Tensor

    def rows(self, index: Tensor) -> NormalizedGame:
        """Return a copy of the rows that index [R] names."""
        return NormalizedGame(self.log_base[index], self.values[index])

    def to(self, dtype: torch.dtype) -> NormalizedGame:
        """Return the same games in another floating-point type."""
        return NormalizedGame(self.log_base.to(dtype), self.values.to(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """What turns a game into natural units and back, measured in one pass over it.

    log_norm: logarithm of the sum of the unnormalised base weights, [B].
    best: each principal's highest value of a token that can be drawn, in the caller's unit, [B, J].
    mean: E_pi0[v_j], in the caller's unit, [B, J].
    temperature: the agent temperature, in the caller's unit, [B].
    finite: the row has a token that can be drawn, and the values of all such tokens are finite, [B].
    unmasked: in no row does anything have to be masked or clamped, which saves passes over the values.
    """

    log_norm: Tensor
    best: Tensor
    mean: Tensor
    temperature: Tensor
    finite: Tensor
    unmasked: bool

    @property
    def no_offer_thresholds(self) -> Tensor:
        """Return the scaled E_pi0[v_j] + tau [B, J]: each principal's threshold while nobody pays."""
        return ((self.mean - self.best) / self.temperature[:, None]).clamp_min(LOWEST_VALUE) + 1.0

    def thresholds(self, scaled_BJ: Tensor) -> Tensor:
        """Return scaled thresholds [B, J] in the caller's unit; NaN for rows that are not finite."""
        thresholds_BJ = self.best + scaled_BJ * self.temperature[:, None]
        return torch.where(self.finite[:, None], thresholds_BJ, torch.nan)


def measure(game: Game, *, reads_back: bool = True) -> Measures:
    """Measure a game in one pass, a block of rows at a time.

    reads_back: read from the device whether anything has to be masked, for which the host waits for a GPU. If False,
        everything is masked without asking; the results are the same.
    """
    blocks = [_measure_block(game, rows, reads_back) for rows in row_blocks(game)]
    parts = blocks[0] if len(blocks) == 1 else [torch.cat(tensors) for tensors in zip(*blocks, strict=True)]
    log_norm_B, best_BJ, mean_BJ, finite_B, unmasked_B = parts
    unmasked = reads_back and bool(unmasked_B.all())
    return Measures(log_norm_B, best_BJ, mean_BJ, game.row_temperatures, finite_B, unmasked)


def row_blocks(game: Game, num_rows: int | None = None) -> list[slice]:
    """Return slices that cover num_rows rows (None: those of the game), with small [rows, J, V] temporaries.

    At least one slice even without rows, so that the blocks' results can always be concatenated.
    """
    num_rows = game.num_rows if num_rows is None else num_rows
    limit = ELEMENTS_PER_BLOCK.get(game.values.device.type, _ELEMENTS_PER_BLOCK_ELSEWHERE)
    size = max(1, limit // (max(1, game.num_principals) * game.num_tokens))
    return [slice(start, start + size) for start in range(0, max(1, num_rows), size)]


def select(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Return some rows of a tensor: a view for a slice, a copy for an index."""
    if isinstance(rows, slice):
        return tensor[rows]
    return tensor.index_select(0, rows)


def log_base(game: Game, measures: Measures, rows: slice | Tensor) -> Tensor:
    """Return the normalised base of some rows [R, V]; zeros for rows that are not finite."""
    base_RV = select(game.base_logprobs, rows) - measures.log_norm[rows, None]
    return base_RV if measures.unmasked else torch.where(measures.finite[rows, None], base_RV, 0.0)


def excess(
    game: Game,
    measures: Measures,
    rows: slice | Tensor,
    scaled_RJ: Tensor,
    principals: slice = _ALL,
) -> Tensor:
    """Return v - c [R, J, V] in the caller's unit, at scaled thresholds [R, J].

    0 for tokens that cannot be drawn and for rows that are not finite.
    """
    best_RJ, temperature_R1 = measures.best[rows, principals], measures.temperature[rows, None]
    values_RJV = select(game.values[:, principals], rows)
    excess_RJV = (
        values_RJV - best_RJ[..., None]
    )  # before the threshold, so that a large common offset costs no digits
    if not measures.unmasked:
        # in the caller's unit, where a very large agent temperature would make it -inf
        lowest_R1 = (LOWEST_VALUE * temperature_R1).clamp_min(torch.finfo(best_RJ.dtype).min)
        excess_RJV = excess_RJV.clamp_min_(lowest_R1[..., None])
    excess_RJV = excess_RJV.sub_((scaled_RJ * temperature_R1)[..., None])
    return excess_RJV if measures.unmasked else torch.where(_counts(game, measures, rows)[:, None], excess_RJV, 0.0)


def scale(game: Game, measures: Measures, rows: slice | Tensor = _ALL) -> NormalizedGame:
    """Return some rows of a game in natural units, with every token."""
    base_RV = log_base(game, measures, rows)
    values_RJV = select(game.values, rows) - measures.best[rows, :, None]
    values_RJV = values_RJV.div_(measures.temperature[rows, None, None])
    if not measures.unmasked:
        values_RJV = values_RJV.clamp_min_(LOWEST_VALUE)
        values_RJV = torch.where(_counts(game, measures, rows)[:, None], values_RJV, 0.0)
    return NormalizedGame(base_RV, values_RJV)


def _counts(game: Game, measures: Measures, rows: slice | Tensor) -> Tensor:
    return (select(game.base_logprobs, rows) > -torch.inf) & measures.finite[rows, None]


def _measure_block(game: Game, rows: slice, reads_back: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    base_RV, values_RJV = game.base_logprobs[rows], game.values[rows]
    weights_RV = torch.softmax(base_RV, 1)
    highest_R1 = base_RV.amax(1, keepdim=True)
    unmasked_R = base_RV.amin(1) > -torch.inf
    undrawable_RV = None if reads_back and bool(unmasked_R.all()) else base_RV == -torch.inf
    best_RJ, lowest_RJ, mean_RJ = _spread(values_RJV, weights_RV, undrawable_RV)
    finite_R1 = torch.isfinite(highest_R1) & ((best_RJ < torch.inf) & (lowest_RJ > -torch.inf)).all(1, keepdim=True)
    narrow_RJ = (lowest_RJ - best_RJ) / game.row_temperatures[rows, None] > LOWEST_VALUE
    log_norm_R1 = highest_R1 - weights_RV.amax(1, keepdim=True).log()
    unmasked_R = unmasked_R & finite_R1[:, 0] & narrow_RJ.all(1)
    if not (reads_back and bool(finite_R1.all())):
        log_norm_R1, best_RJ, mean_RJ = (
            torch.where(finite_R1, part, 0.0) for part in (log_norm_R1, best_RJ, mean_RJ)
        )
    return log_norm_R1[:, 0], best_RJ, mean_RJ, finite_R1[:, 0], unmasked_R


def _spread(values_RJV: Tensor, weights_RV: Tensor, undrawable_RV: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest, the lowest and the weighted sum of the values of tokens that can be drawn, each [R, J]."""
    weights_R1V = weights_RV[:, None]
    if undrawable_RV is None:
        return values_RJV.amax(2), values_RJV.amin(2), (values_RJV * weights_R1V).sum(2)
    undrawable_R1V = undrawable_RV[:, None]
    high_RJ = values_RJV.masked_fill(undrawable_R1V, -torch.inf).amax(2)
    low_RJ = values_RJV.masked_fill(undrawable_R1V, torch.inf).amin(2)
    return high_RJ, low_RJ, (values_RJV.masked_fill(undrawable_R1V, 0.0) * weights_R1V).sum(2)
