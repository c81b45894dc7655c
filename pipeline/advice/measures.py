"""What a principal's token rewards are like: how large, how sparse, how noisy.

All means over tokens are taken under the base, whose likely tokens are those that steering can move. v is q less its
mean under the base at each step.

N games, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.advice.recording import RecordedGames


@dataclass(frozen=True, slots=True)
class RewardMeasures:
    """Of one principal.

    Args:
        spread: root mean square of v, in nats.
        token_share: E[v^2]^2 / E[v^4] within a step, the mean weighted by E[v^2]: p, where a share p of the base's
            mass has values of one size and the rest has none.
        step_share: the same over steps: (mean of e)^2 / mean of e^2, with e = E[v^2] of a step.
        noise: root mean square of what the view does not share, in nats, whichever of both is larger:
            sqrt(E[v^2] (1 - agreement)), where principal and view have equal shares of noise; None without a view.
        agreement: E[v v_view] / sqrt(E[v^2] E[v_view^2]), a correlation; None without a view.
    """

    spread: float
    token_share: float
    step_share: float
    noise: float | None
    agreement: float | None


def measure_rewards(base_NK: Tensor, reward_NK: Tensor, view_NK: Tensor | None) -> RewardMeasures:
    """Measure a principal's q [N, K], and how far a second view of its objective agrees."""
    value_NK = centred(base_NK, reward_NK)
    energy_N, fourth_N = _mean(base_NK, value_NK**2), _mean(base_NK, value_NK**4)
    energy = float(energy_N.mean())
    if energy == 0:
        return RewardMeasures(0.0, 1.0, 1.0, None if view_NK is None else 0.0, None)
    share_N = torch.where(fourth_N > 0, energy_N**2 / fourth_N.clamp_min(1e-300), 0.0)
    noise = agreement = None
    if view_NK is not None:
        agreement = correlation(base_NK, reward_NK, view_NK)
        noise = math.sqrt(energy * min(1.0, max(0.0, 1 - agreement)))
    return RewardMeasures(
        spread=math.sqrt(energy),
        token_share=float((share_N * energy_N).sum() / energy_N.sum()),
        step_share=float(energy_N.mean() ** 2 / (energy_N**2).mean()),
        noise=noise,
        agreement=agreement,
    )


def with_equal_sizes(games: RecordedGames, views: Mapping[str, str]) -> RecordedGames:
    """The same games, with every view multiplied so that it is as large as its principal.

    Two trainings for one objective may differ in size, as two wordings may. What a louder view says would count more
    than its principal's weight.

    Args:
        games: recorded.
        views: by principal the name of its view's rewards.
    """
    rewards = dict(games.rewards)
    for name, view in views.items():
        size, its_own = (_spread(games.base_NK, games.rewards[each]) for each in (name, view))
        if its_own > 0:
            rewards[view] = games.rewards[view] * (size / its_own)
    return replace(games, rewards=rewards)


def correlation(base_NK: Tensor, one_NK: Tensor, other_NK: Tensor) -> float:
    """E[v v'] / sqrt(E[v^2] E[v'^2]) of two principals, under the base; 0 where one has no values."""
    ours, theirs = centred(base_NK, one_NK), centred(base_NK, other_NK)
    norm = math.sqrt(float(_mean(base_NK, ours**2).mean()) * float(_mean(base_NK, theirs**2).mean()))
    return float(_mean(base_NK, ours * theirs).mean()) / norm if norm else 0.0


def _spread(base_NK: Tensor, reward_NK: Tensor) -> float:
    return math.sqrt(float(_mean(base_NK, centred(base_NK, reward_NK) ** 2).mean()))


def centred(base_NK: Tensor, reward_NK: Tensor) -> Tensor:
    """q less its mean under the base at each game."""
    return reward_NK - _mean(base_NK, reward_NK)[:, None]


def _mean(base_NK: Tensor, values_NK: Tensor) -> Tensor:
    """The mean under the base, [N]; candidates that min_p dropped do not count."""
    mass_NK = base_NK.exp()
    return torch.where(mass_NK > 0, mass_NK * values_NK, 0.0).sum(-1)
