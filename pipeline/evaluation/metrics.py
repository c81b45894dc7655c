"""Metrics of points in the space of objectives; a higher score is always better.

To add a metric of a rule:

1. Write the function here: points [N, M] in, a number out, without any knowledge of runs.
2. Add a method to `BootstrapSamples` in `bootstrap.py` that evaluates it in every bootstrap sample: variants in, [S]
   out.
3. Add its name and the method to `rule_metrics` in `summary.py`. _metrics.json then has it for each rule, each agent
   temperature and as a paired difference of two rules, each with an interval.
4. For a sentence in the terminal and the report, and for the title of a chart, add the name to `METRICS` in
   `reading.py` and in `pipeline/reporting/comparison.py`.

S bootstrap samples, P prompts, A answers, N points, M objectives, L levels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.errors import ConfigurationError

Floats = np.ndarray[Any, np.dtype[np.float64]]
MARGIN = 0.1


def check_hypervolume() -> None:
    """Raise ConfigurationError where the package that computes hypervolumes is not installed."""
    try:
        import moocore  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "an evaluation needs the package moocore: install cage-align with the extra `evaluate`"
        ) from None


def hypervolume(points_NM: Floats, reference_M: Floats) -> float:
    """The volume of the space that the points dominate above the reference point, by moocore."""
    import moocore

    # a point below the reference in any objective spans no volume; moocore minimises, hence the signs
    better_NM = points_NM[(points_NM > reference_M).all(1)]
    return float(moocore.hypervolume(-better_NM, ref=-reference_M)) if len(better_NM) else 0.0


def default_reference(points_NM: Floats) -> Floats:
    """Of each objective the lowest value less a tenth of its range.

    The margin lets the worst point count as well: at the reference point itself it would span no volume.
    """
    low_M, high_M = points_NM.min(0), points_NM.max(0)
    reference_M: Floats = low_M - MARGIN * (high_M - low_M)
    return reference_M


def front(points_NM: Floats) -> Floats:
    """The Pareto front: the points that no other dominates, each once, in the order of the first objective."""
    unique = np.unique(points_NM, axis=0)
    kept: Floats = unique[on_front(unique, unique) > 0]
    return kept


def published_reference(points_NM: Floats) -> Floats:
    """Of each objective the lowest value less 1, as CAGE's public evaluation takes it for scores of reward models."""
    reference_M: Floats = points_NM.min(0) - 1.0
    return reference_M


def on_front(points_NM: Floats, among_NM: Floats) -> Floats:
    """Whether each of the first points is dominated by none of the others, [N] of 0 and 1."""
    own_N1M, others_1NM = points_NM[:, None], among_NM[None]
    beats_NN = np.all(others_1NM >= own_N1M, axis=2) & np.any(others_1NM > own_N1M, axis=2)
    kept_N: Floats = 1.0 - np.any(beats_NN, axis=1)
    return kept_N


def extent(points_NM: Floats) -> float:
    """The diagonal of the box around the points as a share of that of the unit cube ("maximum spread").

    Zitzler 1999, divided by its largest value for objectives in [0, 1].
    """
    sides_M = points_NM.max(0) - points_NM.min(0)
    return float(np.sqrt((sides_M**2).mean()))


def inverted_generational_distance(points_NM: Floats, front_NM: Floats) -> float:
    """The mean distance from each point of a front to the nearest of the points, by moocore."""
    import moocore

    return float(moocore.igd(-points_NM, ref=-front_NM))


def gaps(points_NM: Floats) -> Floats | None:
    """By objective the mean squared step between neighbouring values; None for a single point.

    Their sum over a front is its sparsity (Xu et al. 2020, "Prediction-Guided Multi-Objective Reinforcement
    Learning"): less is denser control.
    """
    if len(points_NM) < 2:
        return None
    steps_NM = np.diff(np.sort(points_NM, axis=0), axis=0)
    mean_M: Floats = (steps_NM**2).mean(0)
    return mean_M


def settled(values: Floats) -> Floats:
    """Values to 12 digits of the largest, so that sums of the same numbers in another order are equal.

    Otherwise points that tie would dominate each other, and weights of one level would be several, by rounding.
    """
    known = np.abs(values[np.isfinite(values)])
    largest = float(known.max()) if known.size else 0.0
    rounded: Floats = np.round(values, 11 - math.floor(math.log10(largest))) if largest > 0 else values
    return rounded


def ranks(values_N: Floats) -> Floats:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank_N: Floats = ((last - counts + last - 1) / 2)[inverse]
    return mean_rank_N


def spearman(first_N: Floats, second_N: Floats) -> float | None:
    """Rank correlation; None where one of them does not vary."""
    centred = [ranks(values) - (len(values) - 1) / 2 for values in (first_N, second_N)]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / norm if norm else None


def is_monotone(weights_N: Floats, values_N: Floats) -> bool | None:
    """Whether the value, averaged over equal weights, never falls as the weight rises; None for a single weight."""
    stays = _does_not_fall(weights_N, values_N)
    return bool(stays.all()) if len(stays) else None


def monotone_share(weights_N: Floats, values_N: Floats) -> float | None:
    """The share of steps to the next larger weight at which the value, averaged over equal weights, does not fall."""
    stays = _does_not_fall(weights_N, values_N)
    return float(stays.mean()) if len(stays) else None


def _does_not_fall(weights_N: Floats, values_N: Floats) -> Floats:
    """Of each step to the next larger weight: 1 where the mean value of equal weights does not fall, else 0."""
    means = np.array([values_N[weights_N == level].mean() for level in np.unique(weights_N)])
    # below any difference of scores, and above the rounding of a mean
    stays: Floats = (np.diff(means) >= -1e-12 * np.abs(means).max(initial=0.0)).astype(np.float64)
    return stays


def interpolate_at(x_L: Floats, x_N: Floats, y_NM: Floats) -> Floats:
    """The values at x_L of M curves through the points x_N (in any order), interpolated linearly: [L, M]."""
    order = np.argsort(x_N, kind="stable")
    columns = [np.interp(x_L, x_N[order], y_NM[order, at]) for at in range(y_NM.shape[1])]
    values_LM: Floats = np.stack(columns, axis=1)
    return values_LM


def resample_counts(num_prompts: int, num_samples: int, seed: int, *, per_prompt: int = 1) -> Floats:
    """How often each answer counts, [1 + num_samples, P * per_prompt]: once in the first row, then by the bootstrap.

    Drawing P prompts with replacement is one multinomial draw of counts. Where a prompt has several answers, each
    drawn prompt's answers are drawn with replacement, too. All statistics of a sample use its row of counts, and so
    the same prompts and answers.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_samples)
    if per_prompt > 1:
        counts = generator.multinomial(counts * per_prompt, np.full(per_prompt, 1 / per_prompt))
    drawn = counts.reshape(num_samples, num_prompts * per_prompt)
    return np.concatenate([np.ones((1, drawn.shape[1])), drawn.astype(np.float64)])


def weighted_means(values_NA: Floats, counts_SA: Floats) -> Floats:
    """Means over answers weighted by their counts, [S, N]; an answer without a value (NaN) does not count."""
    known_NA = np.isfinite(values_NA)
    total_SN = counts_SA @ np.where(known_NA, values_NA, 0.0).T
    number_SN = counts_SA @ known_NA.T.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_SN: Floats = total_SN / number_SN
    return means_SN


def interval(samples_S: Floats, confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrap samples."""
    low, high = np.quantile(samples_S, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
