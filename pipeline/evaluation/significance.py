"""How much a difference can be trusted: p values, corrections for many comparisons, and how many prompts it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from pipeline.evaluation.metrics import Floats

# a two-sided test at 5 % with a power of 80 %: the sum of both normal quantiles
QUANTILES = 1.959964 + 0.841621
# prompts that a t test needs beyond a normal one: half the square of the first quantile (Guenther 1981)
EXTRA = 1.959964**2 / 2
LEAST_PROMPTS = 6  # with fewer no p value is below 5 %


def smallest_p_value(num_prompts: int) -> float:
    """The smallest two-sided p value that so many prompts can give: 2^(1 - P).

    Where two systems are alike, the difference on each prompt could as well have the other sign. That makes 2^P
    equally likely outcomes, and in two of them one system leads on every prompt. The bootstrap does not know: where
    prompts agree, however few, so do all of its samples.
    """
    return float(2.0 ** (1 - num_prompts))


def student_p_value(t: float, freedom: int) -> float:
    """The two-sided tail of Student's t, with small tails as exact as large ones.

    With t = sqrt(freedom) tan(x) its density is proportional to cos(x)^(freedom - 1).
    """
    start = math.atan(abs(t) / math.sqrt(freedom))
    # beyond `end` the density is below exp(-45) of that at the start
    end = math.acos(math.cos(start) * math.exp(-45 / (freedom - 1))) if freedom > 1 else math.pi / 2
    nodes, weights = _gauss_legendre()
    angles = start + (end - start) * (nodes + 1) / 2
    area = float((weights * np.cos(angles) ** (freedom - 1)).sum()) * (end - start) / 2
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return min(1.0, 2 * norm * area)


@cache
def _gauss_legendre() -> tuple[Floats, Floats]:
    return np.polynomial.legendre.leggauss(64)


def t_p_value(difference: float, deviation: float, num_prompts: int, *, size: float = 1.0) -> float | None:
    """Two-sided, of a difference with this standard deviation over prompts, by Student's t.

    `size` is that of the numbers whose difference it is: 1e-12 of it is rounding.

    Unlike the share of bootstrap samples it is not bounded by their number, so that it can be adjusted for many
    comparisons; what bounds it is the number of prompts (`smallest_p_value`). None for fewer than two prompts.
    """
    if num_prompts < 2 or not (math.isfinite(difference) and math.isfinite(deviation)):
        return None
    error = deviation / math.sqrt(num_prompts)
    if error <= 1e-12 * max(size, abs(difference)):  # the same on every prompt, up to rounding
        return smallest_p_value(num_prompts) if abs(difference) > 1e-12 * size else 1.0
    return max(smallest_p_value(num_prompts), student_p_value(difference / error, num_prompts - 1))


@cache
def widened(confidence: float, num_prompts: int) -> float:
    """The share of bootstrap samples that an interval of this confidence takes, with so many prompts.

    Few prompts vary less among themselves than all prompts do, so that a bootstrap's own interval is too narrow: at
    95 % it holds the truth in 86 % of cases with 6 prompts, and in 93 % with 20. This is the expanded percentile
    interval (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"), as wide as Student's t.
    """
    if num_prompts < 2:
        return confidence
    low, high = 0.0, 1e9
    while high - low > 1e-9 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p_value(middle, num_prompts - 1) > 1 - confidence else (low, middle)
    return math.erf(low * math.sqrt(num_prompts / (num_prompts - 1) / 2))


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
    """Prompts that a paired t test at 5 % needs to find a difference of this size with a chance of 80 %.

    Of this one comparison: p values that are adjusted for several comparisons need more.

    Args:
        difference: between two systems' means.
        deviation: standard deviation, over prompts, of the difference.
    """
    if difference == 0 or not math.isfinite(difference) or not math.isfinite(deviation):
        return None
    return max(LEAST_PROMPTS, math.ceil((QUANTILES * deviation / difference) ** 2 + EXTRA))


def smallest_difference(deviation: float, num_prompts: int) -> float | None:
    """The difference that so many prompts find with a chance of 80 %.

    None where the deviation is not known, and where so few prompts find none.
    """
    can_find = num_prompts >= LEAST_PROMPTS and math.isfinite(deviation)
    return QUANTILES * deviation / math.sqrt(num_prompts - EXTRA) if can_find else None


def deviation_of(samples_S: Floats, num_prompts: int) -> float:
    """The standard deviation over prompts that bootstrap samples of a statistic imply: sqrt(P) times theirs.

    Prompts are fewer than all there are, so it is divided by P - 1 and not by P. NaN for fewer than two of either.
    """
    known_S = samples_S[np.isfinite(samples_S)]
    is_known = len(known_S) > 1 and num_prompts > 1  # resampling one prompt says nothing about others
    if not is_known:
        return math.nan
    return float(known_S.std(ddof=1) * num_prompts / math.sqrt(num_prompts - 1))
