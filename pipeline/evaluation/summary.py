"""The tables of _metrics.json, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from cage.rule_names import RuleName
from pipeline.evaluation.bootstrap import BootstrapSamples
from pipeline.evaluation.equal_kl import objectives_at, sweeps
from pipeline.evaluation.metrics import Floats, gaps, is_monotone, spearman, weighted_means

Json = dict[str, Any]
TIE = 1e-9  # scores that differ by less are equal up to rounding


def rule_metrics(samples: BootstrapSamples) -> dict[str, Callable[[list[int]], Floats]]:
    """The metrics of a set of variants by name, each [S]; _metrics.json has them by rule and by difference."""
    return {
        "hypervolume": samples.hypervolumes,
        "mip": samples.mean_inner_products,
        "worst_principal": samples.worst_principals,
    }


def points(samples: BootstrapSamples) -> list[Json]:
    """One entry per variant: the means of objectives and judges with intervals, and what the run recorded."""
    data = samples.data
    scores = {name: weighted_means(score_VP, samples.counts_SP) for name, score_VP in data.scores_by_judge.items()}
    numbers = {name: weighted_means(number_VP, samples.counts_SP) for name, number_VP in data.numbers.items()}
    found = []
    for at, variant in enumerate(data.variants):
        objectives = dict(zip(samples.objectives, samples.means_SVM[:, at].T, strict=True))
        found.append(
            {
                "rule": str(variant.rule),
                "agent_temperature": variant.agent_temperature,
                "weights": dict(variant.weights or {}),
                "variant": at,
                "n": len(data.row_ids),
                "objectives": {name: number(means_S[0]) for name, means_S in objectives.items()},
                "intervals": {name: samples.interval(means_S) for name, means_S in objectives.items()},
                "scores": {name: number(means_SV[0, at]) for name, means_SV in scores.items()},
                "score_intervals": {name: samples.interval(means_SV[:, at]) for name, means_SV in scores.items()},
                "worst_principal": number(samples.worst_principals([at])[0]),
                "weighted": number(samples.mean_inner_products([at])[0]),
                **{name: number(means_SV[0, at]) for name, means_SV in numbers.items()},
            }
        )
    return found


def by_rule(samples: BootstrapSamples, equal_kl_scores: Mapping[RuleName, Floats]) -> dict[str, Json]:
    """Each rule over all of its agent temperatures and weights, and at equal KL (see `weighted_scores`)."""
    found = {}
    for rule in samples.data.rules:
        entry = _measures(samples, samples.data.indices(rule))
        if (scores_S := equal_kl_scores.get(rule)) is not None:
            entry["equal_kl"], entry["equal_kl_interval"] = number(scores_S[0]), samples.interval(scores_S)
        found[str(rule)] = entry
    return found


def by_temperature(samples: BootstrapSamples) -> list[Json]:
    """Each rule at each of its agent temperatures."""
    return [
        {
            "rule": str(rule),
            "agent_temperature": temperature,
            **_measures(samples, samples.data.indices(rule, temperature)),
        }
        for rule in samples.data.rules
        for temperature in temperatures_of(samples, rule)
    ]


def pairs_of(samples: BootstrapSamples) -> Iterator[tuple[RuleName, RuleName]]:
    """Every two rules once, the equilibrium first."""
    return combinations(sorted(samples.data.rules, key=lambda rule: rule is not RuleName.EQUILIBRIUM), 2)


def temperatures_of(samples: BootstrapSamples, rule: RuleName) -> list[float]:
    return list(dict.fromkeys(each.agent_temperature for each in samples.data.variants if each.rule is rule))


def _measures(samples: BootstrapSamples, variants: list[int]) -> Json:
    entry: Json = {"num_points": len(variants)}
    measured = {name: measure(variants) for name, measure in rule_metrics(samples).items()}
    # a multiple of the hypervolume: a difference of it would say the same as that of the hypervolume
    normalised_S = samples.normalised_hypervolumes(variants)
    measured = {"hypervolume": measured["hypervolume"], "normalised_hypervolume": normalised_S, **measured}
    measured["kl_per_token"] = samples.kl_SV[:, variants].mean(1)
    for name, value_S in measured.items():
        entry[name], entry[f"{name}_interval"] = number(value_S[0]), samples.interval(value_S)
    entry["num_tokens"] = number(samples.data.numbers["num_tokens"][variants].mean())
    entry["sparsity"] = number(samples.sparsity(variants))
    return entry


def differences(samples: BootstrapSamples, equal_kl_scores: Mapping[RuleName, Floats]) -> list[Json]:
    """Each rule minus each other one, with intervals that are paired by prompt (see `bootstrap`).

    At each agent temperature that both have, over all temperatures, and at equal KL.
    """
    found = []
    for rule, against in pairs_of(samples):
        common = [each for each in temperatures_of(samples, rule) if each in temperatures_of(samples, against)]
        if not (rule.uses_principals and against.uses_principals):
            common = temperatures_of(samples, rule if rule.uses_principals else against)
        for temperature in [*common, *([None] if len(common) > 1 else [])]:
            ours, theirs = (samples.data.indices(each, temperature) for each in (rule, against))
            for metric, measure in rule_metrics(samples).items():
                # the same prompts on both sides of each sample: the difference is paired
                difference_S = measure(ours) - measure(theirs)
                found.append(_difference(samples, rule, against, metric, temperature, difference_S))
        if rule in equal_kl_scores and against in equal_kl_scores:
            difference_S = equal_kl_scores[rule] - equal_kl_scores[against]
            found.append(_difference(samples, rule, against, "equal_kl", None, difference_S))
    return found


def _difference(
    samples: BootstrapSamples,
    rule: RuleName,
    against: RuleName,
    metric: str,
    temperature: float | None,
    difference_S: Floats,
) -> Json:
    return {
        "rule": str(rule),
        "against": str(against),
        "metric": metric,
        "agent_temperature": temperature,
        "difference": number(difference_S[0]),
        "interval": samples.interval(difference_S),
    }


def control(samples: BootstrapSamples) -> list[Json]:
    """Whether raising a principal's weight raises its objective, by rule and agent temperature."""
    found = []
    for rule in samples.data.rules:
        if not rule.uses_principals:
            continue
        for temperature in temperatures_of(samples, rule):
            variants = [
                at for at in samples.data.indices(rule, temperature) if np.isfinite(samples.weights_VM[at]).all()
            ]
            gaps_M = gaps(samples.normalised(samples.means_SVM[0, variants])) if variants else None
            for index, name in enumerate(samples.objectives):
                weights, values = samples.weights_VM[variants, index], samples.means_SVM[0, variants, index]
                found.append(
                    {
                        "rule": str(rule),
                        "agent_temperature": temperature,
                        "principal": name,
                        "objective": name,
                        "spearman": number(spearman(weights, values)),
                        "is_monotone": is_monotone(weights, values),
                        "sparsity": None if gaps_M is None else number(gaps_M[index]),
                    }
                )
    return found


def equal_kl(samples: BootstrapSamples) -> list[Json]:
    """Objectives at KL levels that all rules reach, by weight vector."""
    found = []
    for sweep in sweeps(samples):
        for rule in sweep.by_rule:
            reached = objectives_at(samples, sweep, rule)
            if reached is None:
                continue
            vector_M = samples.weights_VM[sweep.by_rule[rule][0]]
            for level, values_M in zip(*reached, strict=True):
                found.append(
                    {
                        "rule": str(rule),
                        "weights": sweep.weights,
                        "kl_per_token": number(level),
                        "objectives": dict(zip(samples.objectives, map(number, values_M), strict=True)),
                        "weighted": number(samples.normalised(values_M) @ vector_M),
                    }
                )
    return found


def win_rates(samples: BootstrapSamples) -> list[Json]:
    """By pair of rules and objective: prompts won, tied and lost at equal agent temperature and weights.

    The base has neither, so it is compared with every variant of the other rule.
    """
    found = []
    variants = samples.data.variants
    for rule, against in pairs_of(samples):
        pairs: dict[float, list[tuple[int, int]]] = {}
        for ours in samples.data.indices(rule):
            for theirs in samples.data.indices(against):
                left, right = variants[ours], variants[theirs]
                same = (left.agent_temperature, left.weights) == (right.agent_temperature, right.weights)
                if same or not (rule.uses_principals and against.uses_principals):
                    temperature = (left if rule.uses_principals else right).agent_temperature
                    pairs.setdefault(temperature, []).append((ours, theirs))
        for temperature, matched in pairs.items():
            for name, judge in samples.judges.items():
                scores_VP = samples.data.scores_by_judge[judge]
                lead = np.concatenate([scores_VP[ours] - scores_VP[theirs] for ours, theirs in matched])
                found.append(
                    {
                        "rule": str(rule),
                        "against": str(against),
                        "objective": name,
                        "agent_temperature": temperature,
                        "wins": int((lead > TIE).sum()),
                        "ties": int((abs(lead) <= TIE).sum()),
                        "losses": int((lead < -TIE).sum()),
                    }
                )
    return found


def number(value: Any) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if value is not None and np.isfinite(value) else None
