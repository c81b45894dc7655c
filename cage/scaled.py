"""A game in its natural unit: values in agent temperatures, measured down from each principal's best token.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cage.game import Game

LOWEST_VALUE = -1e30  # keeps products with probabilities finite in float32


@dataclass(frozen=True, slots=True, eq=False)
class ScaledGame:
    """What the solvers iterate on. Every number is finite, except `-inf` in log_base for tokens that cannot be drawn.

    log_base [B, V] is normalised; values [B, J, V] are (v - max v) / tau, so the best drawable token has 0;
    best [B, J] is max v and temperature [B] is tau, in the caller's unit; finite [B] marks the rows that had
    finite input (the others hold a game without values).
    """

    log_base_BV: Tensor
    values_BJV: Tensor
    best_BJ: Tensor
    temperature_B: Tensor
    finite_B: Tensor

    def thresholds(self, scaled_BJ: Tensor) -> Tensor:
        """Return thresholds in the caller's unit; NaN for rows without finite input."""
        thresholds_BJ = self.best_BJ + scaled_BJ * self.temperature_B[:, None]
        return torch.where(self.finite_B[:, None], thresholds_BJ, torch.nan)


def scale(game: Game) -> ScaledGame:
    """Normalise the base, scale and shift the values, and set aside the rows that are not finite."""
    base_BV, values_BJV = game.base_logprobs, game.values
    drawable_BV = base_BV > -torch.inf
    log_norm_B = torch.logsumexp(base_BV, -1)
    seen_BJV = torch.where(drawable_BV[:, None], values_BJV, 0.0)
    finite_B = torch.isfinite(log_norm_B) & torch.isfinite(seen_BJV).all(-1).all(-1)
    log_base_BV = torch.where(finite_B[:, None], base_BV - log_norm_B[:, None], 0.0)
    usable_BV = drawable_BV & finite_B[:, None]
    best_BJ = torch.where(usable_BV[:, None], values_BJV, -torch.inf).amax(-1)
    best_BJ = torch.where(finite_B[:, None], best_BJ, 0.0)
    scaled_BJV = (values_BJV - best_BJ[..., None]) / game.temperature_B[:, None, None]
    scaled_BJV = torch.where(usable_BV[:, None], scaled_BJV.clamp_min(LOWEST_VALUE), 0.0)
    return ScaledGame(log_base_BV, scaled_BJV, best_BJ, game.temperature_B, finite_B)
