"""Compare rules at equal KL to the base.

A rule can buy reward with divergence from the base, by a lower agent temperature. So rules are also compared at equal
KL: for one weight vector, a rule's agent temperatures give a curve of objectives over the KL to the base. Where the
base is compared too, the curve starts there, at KL 0. Curves are read at a few levels inside the range of KL that all
rules reach, with linear interpolation between measured points and no extrapolation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cage.rule_names import RuleName
from pipeline.evaluation.bootstrap import BootstrapSamples
from pipeline.evaluation.metrics import Floats, interpolate_at

SHARES_L = np.array([0.25, 0.5, 0.75, 1.0])  # where in the common range of KL the curves are compared
LEAST_KL = 1e-6  # nats per token; a shorter common range is rounding


@dataclass(frozen=True, slots=True)
class Sweep:
    """The variants of each rule with one weight vector.

    Args:
        weights: the weight vector, by principal.
        by_rule: indices of each rule's variants, one per agent temperature.
        base: the index of the base's variant; None where the base is not compared.
    """

    weights: dict[str, float]
    by_rule: dict[RuleName, list[int]]
    base: int | None

    def curve(self, rule: RuleName) -> list[int]:
        """Indices of the variants on a rule's curve: the base first, then one per agent temperature."""
        return [*([self.base] if self.base is not None else []), *self.by_rule[rule]]

    def levels(self, kl_V: Floats) -> Floats | None:
        """The KL levels [L] at which to compare, inside every rule's range; None where the ranges do not overlap."""
        reached = [kl_V[self.curve(rule)] for rule in self.by_rule]
        low, high = max(each.min() for each in reached), min(each.max() for each in reached)
        return low + SHARES_L * (high - low) if high - low > LEAST_KL else None


def sweeps(samples: BootstrapSamples) -> list[Sweep]:
    """One sweep for each weight vector that every rule but the base was run with; none for a single rule."""
    variants = samples.data.variants
    rules = [rule for rule in samples.data.rules if rule.uses_principals]
    base = next(iter(samples.data.indices(RuleName.BASE)), None)
    found: dict[tuple[tuple[str, float], ...], dict[RuleName, list[int]]] = {}
    for at, variant in enumerate(variants):
        if variant.rule.uses_principals and np.isfinite(samples.weights_VM[at]).all():
            by_rule = found.setdefault(tuple((variant.weights or {}).items()), {})
            by_rule.setdefault(variant.rule, []).append(at)
    return [
        Sweep(dict(weights), by_rule, base)
        for weights, by_rule in found.items()
        if len(by_rule) == len(rules) and len(rules) > 1
    ]


def objectives_at(
    samples: BootstrapSamples, sweep: Sweep, rule: RuleName, sample: int = 0
) -> tuple[Floats, Floats] | None:
    """The KL levels [L] and a rule's objectives there [L, M] in one bootstrap sample (0: the data itself).

    Levels are found anew in each sample, because a sample's curves may reach other values of KL.
    """
    levels_L = sweep.levels(samples.kl_SV[sample])
    if levels_L is None:
        return None
    curve = sweep.curve(rule)
    return levels_L, interpolate_at(levels_L, samples.kl_SV[sample, curve], samples.means_SVM[sample, curve])


def weighted_scores(samples: BootstrapSamples) -> dict[RuleName, Floats]:
    """By rule the mean over weight vectors and KL levels of w . r, [S], where r are normalised objectives.

    NaN in samples whose curves have no common range of KL; empty where there are no two rules to compare.
    """
    all_sweeps = sweeps(samples)
    rules = [rule for rule in samples.data.rules if all_sweeps and rule.uses_principals]
    scores: dict[RuleName, Floats] = {rule: np.full(len(samples.means_SVM), np.nan) for rule in rules}
    for sample in range(len(samples.means_SVM)):
        for rule in rules:
            found = [_weighted_score(samples, sweep, rule, sample) for sweep in all_sweeps]
            known = [score for score in found if score is not None]
            if known:
                scores[rule][sample] = np.mean(known)
    return scores


def _weighted_score(samples: BootstrapSamples, sweep: Sweep, rule: RuleName, sample: int) -> float | None:
    reached = objectives_at(samples, sweep, rule, sample)
    if reached is None:
        return None
    return float((samples.normalised(reached[1]) @ samples.weights_VM[sweep.by_rule[rule][0]]).mean())
