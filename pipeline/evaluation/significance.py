"""How much a difference can be trusted: p values, corrections for many comparisons, and how many prompts it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.metrics import Floats

# a two-sided test at 5 % with a power of 80 %: the sum of both normal quantiles
QUANTILES = 1.959964 + 0.841621
LEAST_PROMPTS = 6  # with fewer no p value is below 5 %


def smallest_p_value(num_prompts: int) -> float:
    """The smallest two-sided p value that so many prompts can give: 2^(1 - P).

    Where two systems are alike, the difference on each prompt could as well have the other sign. That makes 2^P
    equally likely outcomes, and in two of them one system leads on every prompt. The bootstrap does not know: where
    prompts agree, however few, so do all of its samples.
    """
    return float(2.0 ** (1 - num_prompts))


def p_value(difference_S: Floats, num_prompts: int) -> float | None:
    """Twice the share of bootstrap samples on the far side of 0, and no less than samples and prompts can resolve.

    None for fewer than two prompts: resampling one says nothing about others.
    """
    known_S = difference_S[np.isfinite(difference_S)]
    if not len(known_S) or num_prompts < 2:
        return None
    tail = min((known_S <= 0).sum(), (known_S >= 0).sum())
    return float(min(1.0, max(smallest_p_value(num_prompts), 2 * (tail + 1) / (len(known_S) + 1))))


def normal_p_value(difference: float, deviation: float, num_prompts: int) -> float | None:
    """Two-sided, of a difference with this standard deviation over prompts, by the normal distribution.

    Unlike the share of bootstrap samples it is not bounded by their number, so that it can be adjusted for many
    comparisons; what bounds it is the number of prompts (`smallest_p_value`). None for fewer than two prompts.
    """
    if num_prompts < 2 or not (math.isfinite(difference) and math.isfinite(deviation)):
        return None
    error = deviation / math.sqrt(num_prompts)
    if error < 1e-12 * max(1.0, abs(difference)):  # the same on every prompt, up to rounding
        return smallest_p_value(num_prompts) if abs(difference) > 1e-12 else 1.0
    return max(smallest_p_value(num_prompts), math.erfc(abs(difference) / error / math.sqrt(2)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values (Holm 1979): rejecting those below a level keeps the chance of a false rejection below it."""
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, at) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[at] = highest
    return adjusted


def prompts_for(difference: float, deviation: float) -> int | None:
    """Prompts that a paired test at 5 % needs to find a difference of this size with a chance of 80 %.

    Args:
        difference: between two systems' means.
        deviation: standard deviation, over prompts, of the difference.
    """
    if difference == 0 or not math.isfinite(difference) or not math.isfinite(deviation):
        return None
    return max(LEAST_PROMPTS, math.ceil((QUANTILES * deviation / difference) ** 2))


def smallest_difference(deviation: float, num_prompts: int) -> float | None:
    """The difference that so many prompts find with a chance of 80 %.

    None where the deviation is not known, and where so few prompts find none.
    """
    can_find = num_prompts >= LEAST_PROMPTS and math.isfinite(deviation)
    return QUANTILES * deviation / math.sqrt(num_prompts) if can_find else None


def deviation_of(samples_S: Floats, num_prompts: int) -> float:
    """The standard deviation over prompts that bootstrap samples of a statistic imply: sqrt(P) times theirs.

    NaN for fewer than two of either.
    """
    known_S = samples_S[np.isfinite(samples_S)]
    is_known = len(known_S) > 1 and num_prompts > 1  # resampling one prompt says nothing about others
    return float(known_S.std(ddof=1) * math.sqrt(num_prompts)) if is_known else math.nan
