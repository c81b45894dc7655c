"""metrics.json: the landscape in numbers, for programs, the report and the reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from pipeline.config.sections import RuleName
from pipeline.evaluation.equal_kl import objectives_at, sweeps
from pipeline.evaluation.landscape import Landscape
from pipeline.evaluation.metrics import Floats, gaps, is_monotone, spearman, weighted_means

Json = dict[str, Any]
TIE = 1e-9


def points(land: Landscape) -> list[Json]:
    """One a variant: objectives and every judge's mean with intervals, and what the run recorded."""
    data = land.data
    scores = {name: weighted_means(score_VP, land.counts_SP) for name, score_VP in data.scores_by_judge.items()}
    numbers = {name: weighted_means(number_VP, land.counts_SP) for name, number_VP in data.numbers.items()}
    found = []
    for at, variant in enumerate(data.variants):
        objectives = dict(zip(land.objectives, land.means_SVM[:, at].T, strict=True))
        found.append(
            {
                "rule": str(variant.rule),
                "agent_temperature": variant.agent_temperature,
                "weights": dict(variant.weights or {}),
                "variant": at,
                "n": len(data.row_ids),
                "objectives": {name: number(means_S[0]) for name, means_S in objectives.items()},
                "intervals": {name: land.interval(means_S) for name, means_S in objectives.items()},
                "scores": {name: number(means_SV[0, at]) for name, means_SV in scores.items()},
                "score_intervals": {name: land.interval(means_SV[:, at]) for name, means_SV in scores.items()},
                "worst_principal": number(land.worst_principals([at])[0]),
                "weighted": number(land.mean_inner_products([at])[0]),
                **{name: number(means_SV[0, at]) for name, means_SV in numbers.items()},
            }
        )
    return found


def by_rule(land: Landscape, equal_kl_scores: Mapping[RuleName, Floats]) -> dict[str, Json]:
    """Each rule over all of its agent temperatures and weights, and at equal KL (see `weighted_scores`)."""
    found = {}
    for rule in land.data.rules:
        entry = _measures(land, land.data.indices(rule))
        if (scores_S := equal_kl_scores.get(rule)) is not None:
            entry["equal_kl"], entry["equal_kl_interval"] = number(scores_S[0]), land.interval(scores_S)
        found[str(rule)] = entry
    return found


def by_temperature(land: Landscape) -> list[Json]:
    """Each rule at each of its agent temperatures."""
    return [
        {
            "rule": str(rule),
            "agent_temperature": temperature,
            **_measures(land, land.data.indices(rule, temperature)),
        }
        for rule in land.data.rules
        for temperature in temperatures_of(land, rule)
    ]


def pairs_of(land: Landscape) -> Iterator[tuple[RuleName, RuleName]]:
    """Every two rules once, the equilibrium first."""
    return combinations(sorted(land.data.rules, key=lambda rule: rule is not RuleName.EQUILIBRIUM), 2)


def temperatures_of(land: Landscape, rule: RuleName) -> list[float]:
    return list(dict.fromkeys(each.agent_temperature for each in land.data.variants if each.rule is rule))


def _measures(land: Landscape, variants: list[int]) -> Json:
    entry: Json = {"num_points": len(variants)}
    for name, samples_S in {
        "hypervolume": land.hypervolumes(variants),
        "mip": land.mean_inner_products(variants),
        "worst_principal": land.worst_principals(variants),
        "kl_per_token": land.kl_SV[:, variants].mean(1),
    }.items():
        entry[name], entry[f"{name}_interval"] = number(samples_S[0]), land.interval(samples_S)
    entry["num_tokens"] = number(land.data.numbers["num_tokens"][variants].mean())
    entry["sparsity"] = number(land.sparsity(variants))
    return entry


def differences(land: Landscape, equal_kl_scores: Mapping[RuleName, Floats]) -> list[Json]:
    """Each rule less the others, with intervals of the same bootstrap samples: paired by prompt.

    At each agent temperature that both have, over all of them, and at equal KL.
    """
    found = []
    for rule, against in pairs_of(land):
        common = [each for each in temperatures_of(land, rule) if each in temperatures_of(land, against)]
        if RuleName.BASE in (rule, against):
            common = temperatures_of(land, against if rule is RuleName.BASE else rule)
        for temperature in [*common, *([None] if len(common) > 1 else [])]:
            ours, theirs = (land.data.indices(each, temperature) for each in (rule, against))
            for metric, measure in (
                ("hypervolume", land.hypervolumes),
                ("mip", land.mean_inner_products),
                ("worst_principal", land.worst_principals),
            ):
                samples_S = measure(ours) - measure(theirs)
                found.append(_difference(land, rule, against, metric, temperature, samples_S))
        if rule in equal_kl_scores and against in equal_kl_scores:
            samples_S = equal_kl_scores[rule] - equal_kl_scores[against]
            found.append(_difference(land, rule, against, "equal_kl", None, samples_S))
    return found


def _difference(
    land: Landscape, rule: RuleName, against: RuleName, metric: str, temperature: float | None, samples_S: Floats
) -> Json:
    return {
        "rule": str(rule),
        "against": str(against),
        "metric": metric,
        "agent_temperature": temperature,
        "difference": number(samples_S[0]),
        "interval": land.interval(samples_S),
    }


def control(land: Landscape) -> list[Json]:
    """Whether raising a principal's weight raises its objective, by rule and agent temperature."""
    found = []
    for rule in land.data.rules:
        if rule is RuleName.BASE:
            continue
        for temperature in temperatures_of(land, rule):
            variants = [at for at in land.data.indices(rule, temperature) if np.isfinite(land.weights_VM[at]).all()]
            gaps_M = gaps(land.normalised(land.means_SVM[0, variants])) if variants else None
            for index, name in enumerate(land.objectives):
                weights, values = land.weights_VM[variants, index], land.means_SVM[0, variants, index]
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


def equal_kl(land: Landscape) -> list[Json]:
    """Objectives at KL levels that all rules reach, by weight vector."""
    found = []
    for sweep in sweeps(land):
        for rule in sweep.by_rule:
            reached = objectives_at(land, sweep, rule)
            if reached is None:
                continue
            vector_M = land.weights_VM[sweep.by_rule[rule][0]]
            for level, values_M in zip(*reached, strict=True):
                found.append(
                    {
                        "rule": str(rule),
                        "weights": sweep.weights,
                        "kl_per_token": number(level),
                        "objectives": dict(zip(land.objectives, map(number, values_M), strict=True)),
                        "weighted": number(land.normalised(values_M) @ vector_M),
                    }
                )
    return found


def win_rates(land: Landscape) -> list[Json]:
    """By pair of rules and objective: prompts won, tied and lost at equal agent temperature and weights.

    The base has neither and meets every variant of the other rule.
    """
    found = []
    variants = land.data.variants
    for rule, against in pairs_of(land):
        pairs: dict[float, list[tuple[int, int]]] = {}
        for ours in land.data.indices(rule):
            for theirs in land.data.indices(against):
                left, right = variants[ours], variants[theirs]
                same = (left.agent_temperature, left.weights) == (right.agent_temperature, right.weights)
                if same or RuleName.BASE in (rule, against):
                    temperature = (right if rule is RuleName.BASE else left).agent_temperature
                    pairs.setdefault(temperature, []).append((ours, theirs))
        for temperature, matched in pairs.items():
            for name, judge in land.judges.items():
                scores_VP = land.data.scores_by_judge[judge]
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
