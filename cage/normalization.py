"""A game in its natural unit: values in agent temperatures, measured down from each principal's best token.

Shapes: B rows (R of them in a block), J principals, V tokens (K in a game with pooled tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cage.game import Game

LOWEST_VALUE = -1e30  # keeps products with probabilities finite in float32
_ALL = slice(None)
_NUMBERS_A_BLOCK = {"cpu": 2**19, "cuda": 2**24}  # a CPU's caches; a GPU's memory
_NUMBERS_A_BLOCK_ELSEWHERE = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class NormalizedGame:
    """What the solvers iterate on: finite numbers only, except `-inf` in log_base for tokens that cannot be drawn.

    log_base [B, K] is normalised; values [B, J, K] are (v - max v) / tau, so none is above 0.
    """

    log_base: Tensor
    values: Tensor

    def rows(self, index: Tensor) -> NormalizedGame:
        """Return the games of some rows."""
        return NormalizedGame(self.log_base[index], self.values[index])

    def to(self, dtype: torch.dtype) -> NormalizedGame:
        """Return the same games in another type."""
        return NormalizedGame(self.log_base.to(dtype), self.values.to(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """What turns a game into natural units and back, from one pass over it.

    log_norm [B] normalises the base; best [B, J] is max v and mean [B, J] is E_pi0[v] over drawable tokens, and
    temperature [B] is tau, in the caller's unit; finite [B] marks rows whose drawable numbers are all finite; plain
    says that in no row anything has to be masked or cut.
    """

    log_norm: Tensor
    best: Tensor
    mean: Tensor
    temperature: Tensor
    finite: Tensor
    plain: bool

    @property
    def lone_thresholds(self) -> Tensor:
        """Return E_pi0[v_j] + tau in scaled units [B, J]: where principals stand while nobody pays."""
        return ((self.mean - self.best) / self.temperature[:, None]).clamp_min(LOWEST_VALUE) + 1.0

    def thresholds(self, scaled_BJ: Tensor) -> Tensor:
        """Return thresholds in the caller's unit; NaN for rows that are not finite."""
        thresholds_BJ = self.best + scaled_BJ * self.temperature[:, None]
        return torch.where(self.finite[:, None], thresholds_BJ, torch.nan)


def measure(game: Game, *, looks: bool = True) -> Measures:
    """Read the game once, in blocks of rows.

    What need not be masked is found out by looking at the numbers, for which the host waits for a GPU: without looks
    everything is masked.
    """
    blocks = [_measure_block(game, rows, looks) for rows in row_blocks(game)]
    parts = blocks[0] if len(blocks) == 1 else [torch.cat(tensors) for tensors in zip(*blocks, strict=True)]
    log_norm_B, best_BJ, mean_BJ, finite_B, plain_B = parts
    plain = looks and bool(plain_B.all())
    return Measures(log_norm_B, best_BJ, mean_BJ, game.row_temperatures, finite_B, plain)


def row_blocks(game: Game, num_rows: int | None = None) -> list[slice]:
    """Return slices of num_rows rows, or all, with small [rows, J, V] temporaries; at least one, to be joined."""
    num_rows = game.num_rows if num_rows is None else num_rows
    limit = _NUMBERS_A_BLOCK.get(game.values.device.type, _NUMBERS_A_BLOCK_ELSEWHERE)
    size = max(1, limit // (max(1, game.num_principals) * game.num_tokens))
    return [slice(start, start + size) for start in range(0, max(1, num_rows), size)]


def select(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Return some rows: a view if they are a slice or all of them, else a copy by the fastest way."""
    if isinstance(rows, slice):
        return tensor[rows]
    return tensor.index_select(0, rows)


def log_base(game: Game, measures: Measures, rows: slice | Tensor) -> Tensor:
    """Return the normalised base of some rows [R, V]; zeros for rows that are not finite."""
    base_RV = select(game.base_logprobs, rows) - measures.log_norm[rows, None]
    return base_RV if measures.plain else torch.where(measures.finite[rows, None], base_RV, 0.0)


def excess(
    game: Game,
    measures: Measures,
    rows: slice | Tensor,
    scaled_RJ: Tensor,
    principals: slice = _ALL,
) -> Tensor:
    """Return v - c [R, J, V] in the caller's unit, at scaled thresholds; 0 where a token or row does not count."""
    best_RJ, temperature_R1 = measures.best[rows, principals], measures.temperature[rows, None]
    values_RJV = select(game.values[:, principals], rows)
    excess_RJV = values_RJV - best_RJ[..., None]  # first, so that a large offset costs no digits
    if not measures.plain:
        lowest_R1 = (LOWEST_VALUE * temperature_R1).clamp_min(torch.finfo(best_RJ.dtype).min)
        excess_RJV = excess_RJV.clamp_min_(lowest_R1[..., None])
    excess_RJV = excess_RJV.sub_((scaled_RJ * temperature_R1)[..., None])
    return excess_RJV if measures.plain else torch.where(_counts(game, measures, rows)[:, None], excess_RJV, 0.0)


def scale(game: Game, measures: Measures, rows: slice | Tensor = _ALL) -> NormalizedGame:
    """Return some rows of a game in natural units, every token kept."""
    base_RV = log_base(game, measures, rows)
    values_RJV = select(game.values, rows) - measures.best[rows, :, None]
    values_RJV = values_RJV.div_(measures.temperature[rows, None, None])
    if not measures.plain:
        values_RJV = values_RJV.clamp_min_(LOWEST_VALUE)
        values_RJV = torch.where(_counts(game, measures, rows)[:, None], values_RJV, 0.0)
    return NormalizedGame(base_RV, values_RJV)


def _counts(game: Game, measures: Measures, rows: slice | Tensor) -> Tensor:
    return (select(game.base_logprobs, rows) > -torch.inf) & measures.finite[rows, None]


def _measure_block(game: Game, rows: slice, looks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    base_RV, values_RJV = game.base_logprobs[rows], game.values[rows]
    weights_RV = torch.softmax(base_RV, 1)
    highest_R1 = base_RV.amax(1, keepdim=True)
    plain_R = base_RV.amin(1) > -torch.inf
    undrawable_RV = None if looks and bool(plain_R.all()) else base_RV == -torch.inf
    best_RJ, lowest_RJ, mean_RJ = _spread(values_RJV, weights_RV, undrawable_RV)
    finite_R1 = torch.isfinite(highest_R1) & ((best_RJ < torch.inf) & (lowest_RJ > -torch.inf)).all(1, keepdim=True)
    narrow_RJ = (lowest_RJ - best_RJ) / game.row_temperatures[rows, None] > LOWEST_VALUE
    log_norm_R1 = highest_R1 - weights_RV.amax(1, keepdim=True).log()
    plain_R = plain_R & finite_R1[:, 0] & narrow_RJ.all(1)
    if not (looks and bool(finite_R1.all())):
        log_norm_R1, best_RJ, mean_RJ = (
            torch.where(finite_R1, part, 0.0) for part in (log_norm_R1, best_RJ, mean_RJ)
        )
    return log_norm_R1[:, 0], best_RJ, mean_RJ, finite_R1[:, 0], plain_R


def _spread(values_RJV: Tensor, weights_RV: Tensor, undrawable_RV: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest, the lowest and the weighted sum of the drawable values, each [R, J]."""
    weights_R1V = weights_RV[:, None]
    if undrawable_RV is None:
        return values_RJV.amax(2), values_RJV.amin(2), (values_RJV * weights_R1V).sum(2)
    undrawable_R1V = undrawable_RV[:, None]
    high_RJ = values_RJV.masked_fill(undrawable_R1V, -torch.inf).amax(2)
    low_RJ = values_RJV.masked_fill(undrawable_R1V, torch.inf).amin(2)
    return high_RJ, low_RJ, (values_RJV.masked_fill(undrawable_R1V, 0.0) * weights_R1V).sum(2)
