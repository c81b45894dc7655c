"""Metrics of points in the space of objectives; a higher score is always better.

To add a metric of a rule:

1. Write the function here: points [N, M] in, a number out, without any knowledge of runs.
2. Add a method to `BootstrapSamples` in `bootstrap.py` that evaluates it in every bootstrap sample: variants in, [S]
   out.
3. Add its name and the method to `rule_metrics` in `summary.py`. _metrics.json then has it for each rule, each agent
   temperature and as a paired difference of two rules, each with an interval.
4. For a sentence in the terminal and the report, and for the title of a chart, add the name to `METRICS` in
   `reading.py` and in `pipeline/reporting/comparison.py`.

S bootstrap samples, P prompts, N points, M objectives, L levels.
"""

from __future__ import annotations

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
    beaten = [((unique >= point).all(1) & (unique > point).any(1)).any() for point in unique]
    kept: Floats = unique[~np.array(beaten, dtype=bool)]
    return kept


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
    # 1e-12 is below any difference of scores and above the rounding of a mean
    levels = np.unique(weights_N)
    means = [values_N[weights_N == level].mean() for level in levels]
    return bool((np.diff(means) >= -1e-12).all()) if len(levels) > 1 else None


def interpolate_at(x_L: Floats, x_N: Floats, y_NM: Floats) -> Floats:
    """The values at x_L of M curves through the points x_N (in any order), interpolated linearly: [L, M]."""
    order = np.argsort(x_N, kind="stable")
    columns = [np.interp(x_L, x_N[order], y_NM[order, at]) for at in range(y_NM.shape[1])]
    values_LM: Floats = np.stack(columns, axis=1)
    return values_LM


def resample_counts(num_prompts: int, num_samples: int, seed: int) -> Floats:
    """How often each prompt counts, [1 + num_samples, P]: once each in the first row, then the bootstrap samples.

    Drawing P prompts with replacement is one multinomial draw of counts. All statistics of a sample use its row of
    counts, and so the same prompts.
    """
    draws = np.random.default_rng(seed).multinomial(
        num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_samples
    )
    return np.concatenate([np.ones((1, num_prompts)), draws.astype(np.float64)])


def weighted_means(values_NP: Floats, counts_SP: Floats) -> Floats:
    """Means over prompts weighted by their counts, [S, N]; a prompt without a value (NaN) does not count."""
    known_NP = np.isfinite(values_NP)
    total_SN = counts_SP @ np.where(known_NP, values_NP, 0.0).T
    number_SN = counts_SP @ known_NP.T.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_SN: Floats = total_SN / number_SN
    return means_SN


def interval(samples_S: Floats, confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrap samples."""
    low, high = np.quantile(samples_S, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
