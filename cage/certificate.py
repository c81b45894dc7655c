"""The certificate of an answer: what each principal could still gain by deviating alone.

Independent of the solvers on purpose: it bisects on the game as given, so that it notices a mistake in them.
Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cage.game import Game

_BISECTIONS = 128  # float64 has 53 bits; the rest is for thresholds much closer to 0 than the bracket is wide


class Answer(Protocol):
    """An answer to a game, of any method: a `Solution`, or only the offers."""

    @property
    def incentives(self) -> Tensor:
        """What every principal pays for every token, in the unit of the values, [B, J, V]."""
        ...


def deviation_gain(game: Game, answer: Answer) -> Tensor:
    """Return each principal's utility at its best response to the others, minus its utility now, [B, J].

    game: the game as given to the solver.
    answer: the solution to check.

    In the unit of the values, computed in float64. 0 (up to rounding) for every principal exactly at an equilibrium,
    and positive for a principal that could gain by changing its own offers. NaN for rows without a finite answer.
    """
    base_BV = game.base_logprobs.double()
    drawable_BV = base_BV > -torch.inf
    values_BJV = torch.where(drawable_BV[:, None], game.values.double(), 0.0)
    offers_BJV = answer.incentives.double()
    temperature_B = game.row_temperatures.double()
    total_BV = offers_BJV.sum(1)
    gains = []
    for j in range(game.num_principals):
        values_BV, offer_BV = values_BJV[:, j], offers_BJV[:, j]
        others_BV = base_BV + (total_BV - offer_BV) / temperature_B[:, None]
        now_B = _utility(others_BV, values_BV, offer_BV, temperature_B)
        best_BV = _best_offer(others_BV, values_BV, drawable_BV, temperature_B)
        gains.append(_utility(others_BV, values_BV, best_BV, temperature_B) - now_B)
    return torch.stack(gains, 1) if gains else total_BV.new_zeros((game.num_rows, 0))


def _utility(others_BV: Tensor, values_BV: Tensor, offer_BV: Tensor, temperature_B: Tensor) -> Tensor:
    policy_BV = torch.softmax(others_BV + offer_BV / temperature_B[:, None], -1)
    return (policy_BV * (values_BV - offer_BV)).sum(-1)


def _best_offer(others_BV: Tensor, values_BV: Tensor, drawable_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Bisect on E_pi[max(c - v, 0)] = tau, whose left side increases in c (docs/mathematics.md, section 3)."""
    best_B = torch.where(drawable_BV, values_BV, -torch.inf).amax(-1)
    low_B = torch.where(drawable_BV, values_BV, torch.inf).amin(-1)
    high_B = best_B + temperature_B
    for _ in range(_BISECTIONS):
        middle_B = 0.5 * (low_B + high_B)
        offer_BV = (values_BV - middle_B[:, None]).clamp_min(0.0)
        policy_BV = torch.softmax(others_BV + offer_BV / temperature_B[:, None], -1)
        too_high_B = (policy_BV * (middle_B[:, None] - values_BV).clamp_min(0.0)).sum(-1) > temperature_B
        low_B, high_B = torch.where(too_high_B, low_B, middle_B), torch.where(too_high_B, middle_B, high_B)
    return torch.where(drawable_BV, (values_BV - high_B[:, None]).clamp_min(0.0), 0.0)
