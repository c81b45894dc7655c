"""Compare methods at equal KL to the base.

A rule can buy reward with divergence from the base, by a lower agent temperature. So methods are also compared at
equal KL: for one weight vector, a method's agent temperatures give a curve of objectives over the KL to the base.
Where the base is compared too, the curve starts there, at KL 0. Curves are read at a few levels inside the range of
KL that all methods reach, with linear interpolation between measured points and no extrapolation.

Games over answers reach less KL per token than games over tokens, so the methods of one unit are compared with each
other, and methods of different units two by two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cage.rule_names import RuleName
from pipeline.evaluation.bootstrap import BootstrapSamples
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.metrics import Floats, interpolate_at

SHARES_L = np.array([0.25, 0.5, 0.75, 1.0])  # where in the common range of KL the curves are compared
LEAST_KL = 1e-6  # nats per token; a shorter common range is rounding


@dataclass(frozen=True, slots=True)
class Sweep:
    """The variants of each method with one weight vector.

    Args:
        weights: the weight vector, by principal.
        by_method: indices of each method's variants, one per agent temperature.
        base: the index of the base's variant; None where the base is not compared.
    """

    weights: dict[str, float]
    by_method: dict[str, list[int]]
    base: int | None

    def curve(self, method: str) -> list[int]:
        """Indices of the variants on a method's curve: the base first, then one per agent temperature."""
        return [*([self.base] if self.base is not None else []), *self.by_method[method]]

    def levels(self, kl_V: Floats) -> Floats | None:
        """The KL levels [L] at which to compare, inside every range; None where the ranges do not overlap."""
        reached = [kl_V[self.curve(method)] for method in self.by_method]
        low, high = max(each.min() for each in reached), min(each.max() for each in reached)
        return low + SHARES_L * (high - low) if high - low > LEAST_KL else None


def groups_of(data: Measurements) -> dict[str, list[str]]:
    """By unit the methods that use principals."""
    groups: dict[str, list[str]] = {}
    for method in data.methods:
        variant = data.variant_of(method)
        if variant.rule.uses_principals:
            groups.setdefault(str(variant.unit), []).append(method)
    return groups


def sweeps(samples: BootstrapSamples, methods: Sequence[str]) -> list[Sweep]:
    """One sweep for each weight vector that all of these methods were run with; none for a single method."""
    data = samples.data
    base = next((at for at, variant in enumerate(data.variants) if variant.rule is RuleName.BASE), None)
    found: dict[tuple[tuple[str, float], ...], dict[str, list[int]]] = {}
    for method in methods:
        for at in data.indices(method):
            if np.isfinite(samples.weights_VM[at]).all():
                by_method = found.setdefault(tuple((data.variants[at].weights or {}).items()), {})
                by_method.setdefault(method, []).append(at)
    return [
        Sweep(dict(weights), by_method, base)
        for weights, by_method in found.items()
        if len(by_method) == len(methods) and len(methods) > 1
    ]


def objectives_at(
    samples: BootstrapSamples, sweep: Sweep, method: str, sample: int = 0
) -> tuple[Floats, Floats] | None:
    """The KL levels [L] and a method's objectives there [L, M] in one bootstrap sample (0: the data itself).

    Levels are found anew in each sample, because a sample's curves may reach other values of KL.
    """
    levels_L = sweep.levels(samples.kl_SV[sample])
    if levels_L is None:
        return None
    curve = sweep.curve(method)
    return levels_L, interpolate_at(levels_L, samples.kl_SV[sample, curve], samples.means_SVM[sample, curve])


def weighted_scores(samples: BootstrapSamples, methods: Sequence[str] | None = None) -> dict[str, Floats]:
    """By method the mean over weight vectors and KL levels of w . r, [S], where r are normalised objectives.

    Args:
        samples: the resampled means.
        methods: that are compared with each other; None: all of each unit.

    NaN in samples whose curves have no common range of KL; empty where there are no two methods to compare.
    """
    if methods is None:
        groups = [weighted_scores(samples, group) for group in groups_of(samples.data).values()]
        return {method: score_S for group in groups for method, score_S in group.items()}
    all_sweeps = sweeps(samples, methods)
    if not all_sweeps:
        return {}
    scores: dict[str, Floats] = {method: np.full(len(samples.means_SVM), np.nan) for method in methods}
    for sample in range(len(samples.means_SVM)):
        for method in methods:
            found = [_weighted_score(samples, sweep, method, sample) for sweep in all_sweeps]
            known = [score for score in found if score is not None]
            if known:
                scores[method][sample] = np.mean(known)
    return scores


def difference_at_equal_kl(
    samples: BootstrapSamples, method: str, against: str, in_groups: Mapping[str, Floats]
) -> Floats | None:
    """How much more w . r a method has than another one at equal KL, [S]; None where they are not comparable.

    Args:
        samples: the resampled means.
        method, against: to compare.
        in_groups: scores among the methods of each unit (`weighted_scores`).
    """
    data = samples.data
    if not all(data.rule_of(each).uses_principals for each in (method, against)):
        return None
    if data.variant_of(method).unit is data.variant_of(against).unit:
        scores = in_groups
    else:
        scores = weighted_scores(samples, [method, against])
    return scores[method] - scores[against] if method in scores and against in scores else None


def _weighted_score(samples: BootstrapSamples, sweep: Sweep, method: str, sample: int) -> float | None:
    reached = objectives_at(samples, sweep, method, sample)
    if reached is None:
        return None
    return float((samples.normalised(reached[1]) @ samples.weights_VM[sweep.by_method[method][0]]).mean())
