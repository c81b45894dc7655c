"""The tables of _metrics.json, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from pipeline.evaluation.bootstrap import BootstrapSamples
from pipeline.evaluation.equal_kl import difference_at_equal_kl, groups_of, objectives_at, sweeps
from pipeline.evaluation.metrics import Floats, gaps, is_monotone, monotone_share, spearman, weighted_means
from pipeline.evaluation.pairs import common_temperatures, difference_at_equal_length, matches, pairs_of
from pipeline.evaluation.significance import deviation_of, holm, prompts_for, smallest_difference, t_p_value

Json = dict[str, Any]
TIE = 1e-9  # scores that differ by less, as a share of the judge's largest one, are equal up to rounding


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
    scores = {name: weighted_means(score_VA, samples.counts_SA) for name, score_VA in data.scores_by_judge.items()}
    numbers = {name: weighted_means(number_VA, samples.counts_SA) for name, number_VA in data.numbers.items()}
    found = []
    for at, variant in enumerate(data.variants):
        objectives = dict(zip(samples.objectives, samples.means_SVM[:, at].T, strict=True))
        found.append(
            {
                "rule": data.method_by_variant[at],
                "unit": str(variant.unit),
                "agent_temperature": variant.agent_temperature,
                "uses_temperature": variant.rule.uses_temperature,
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


def by_rule(samples: BootstrapSamples, equal_kl_scores: Mapping[str, Floats]) -> dict[str, Json]:
    """Each method over all of its agent temperatures and weights, and at equal KL (see `weighted_scores`)."""
    found = {}
    for method in samples.data.methods:
        unit = str(samples.data.variant_of(method).unit)
        entry = {"unit": unit, **_measures(samples, samples.data.indices(method))}
        if (scores_S := equal_kl_scores.get(method)) is not None:
            entry["equal_kl"], entry["equal_kl_interval"] = number(scores_S[0]), samples.interval(scores_S)
        found[method] = entry
    return found


def by_temperature(samples: BootstrapSamples) -> list[Json]:
    """Each method at each of its agent temperatures."""
    data = samples.data
    return [
        {
            "rule": method,
            "unit": str(data.variant_of(method).unit),
            "agent_temperature": temperature,
            **_measures(samples, data.indices(method, temperature)),
        }
        for method in data.methods
        for temperature in data.temperatures_of(method)
    ]


def _measures(samples: BootstrapSamples, variants: list[int]) -> Json:
    entry: Json = {"num_points": len(variants)}
    measured = {name: measure(variants) for name, measure in rule_metrics(samples).items()}
    # multiples of the hypervolume, or others of the same points: differences of them would say the same
    of_volume = {
        "hypervolume": measured["hypervolume"],
        "normalised_hypervolume": samples.normalised_hypervolumes(variants),
        "published_hypervolume": samples.hypervolumes(variants, samples.published_point),
        "unit_hypervolume": samples.unit_hypervolumes(variants),
    }
    measured = {**of_volume, **measured, "regret": samples.regrets(variants)}
    measured["kl_per_token"] = samples.kl_SV[:, variants].mean(1)
    entry |= _with_intervals(samples, measured)
    for name in ("kl_per_answer", "num_tokens", "cut", "in_reasoning", "empty", "distinct_2", "repetition_3"):
        if name in samples.data.numbers:
            entry[name] = number(_mean(samples.data.numbers[name][variants]))
    return entry | _with_intervals(samples, samples.front_metrics(variants))


def _with_intervals(samples: BootstrapSamples, measured: Mapping[str, Floats]) -> Json:
    entry: Json = {}
    for name, value_S in measured.items():
        entry[name], entry[f"{name}_interval"] = number(value_S[0]), samples.interval(value_S)
    return entry


def _mean(values: Floats) -> float:
    """The mean of what is known; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def differences(samples: BootstrapSamples, equal_kl_scores: Mapping[str, Floats]) -> list[Json]:
    """Each method minus each other one, with intervals that are paired by prompt (see `bootstrap`).

    At each agent temperature that both have, over all temperatures, at equal KL and at equal length. p values are
    adjusted (Holm) for all pairs that are compared by one metric in one of these ways.
    """
    data, found = samples.data, []
    measures = rule_metrics(samples)

    @cache
    def measured(metric: str, method: str, temperature: float | None) -> Floats:
        return measures[metric](data.indices(method, temperature))

    for method, against in pairs_of(data):
        common = common_temperatures(data, method, against)
        for temperature in [*common, *([None] if len(common) > 1 else [])]:
            for metric in measures:
                # the same prompts on both sides of each sample: the difference is paired
                difference_S = measured(metric, method, temperature) - measured(metric, against, temperature)
                found.append(_difference(samples, method, against, metric, temperature, difference_S))
        held_equal = {
            "equal_kl": difference_at_equal_kl(samples, method, against, equal_kl_scores),
            "equal_length": difference_at_equal_length(samples, method, against),
        }
        for metric, difference in held_equal.items():
            if difference is not None:
                found.append(_difference(samples, method, against, metric, None, difference))
    families: dict[tuple[str, float | None], list[Json]] = {}
    for each in found:
        families.setdefault((each["metric"], each["agent_temperature"]), []).append(each)
    for family in families.values():
        for each, adjusted in zip(family, holm([each["p"] for each in family]), strict=True):
            each["p_adjusted"] = adjusted
    return found


def _difference(
    samples: BootstrapSamples,
    method: str,
    against: str,
    metric: str,
    temperature: float | None,
    difference_S: Floats,
) -> Json:
    num_prompts = len(samples.data.row_ids)
    deviation = deviation_of(difference_S[1:], num_prompts)
    # other metrics are of normalised objectives
    size = samples.box if metric == "hypervolume" and np.isfinite(samples.box) else 1.0
    return {
        "rule": method,
        "against": against,
        "metric": metric,
        "agent_temperature": temperature,
        "difference": number(difference_S[0]),
        "interval": samples.interval(difference_S),
        "p": t_p_value(float(difference_S[0]), deviation, num_prompts, size=size),
        "prompts_for_this_difference": prompts_for(float(difference_S[0]), deviation),
        "smallest_difference_to_find": smallest_difference(deviation, num_prompts),
    }


def control(samples: BootstrapSamples) -> list[Json]:
    """By method, agent temperature and principal: whether raising its weight raises its objective, and its regret."""
    data, found = samples.data, []
    for method in data.methods:
        if not data.rule_of(method).uses_principals:
            continue
        for temperature in data.temperatures_of(method):
            variants = [at for at in data.indices(method, temperature) if np.isfinite(samples.weights_VM[at]).all()]
            gaps_M = gaps(samples.normalised(samples.means_SVM[0, variants])) if variants else None
            for index, name in enumerate(samples.objectives):
                weights, values = samples.weights_VM[variants, index], samples.means_SVM[0, variants, index]
                regret = {"regret": samples.regrets(variants, index)}
                found.append(
                    {
                        "rule": method,
                        "agent_temperature": temperature,
                        "principal": name,
                        "objective": name,
                        "spearman": number(spearman(weights, values)),
                        "is_monotone": is_monotone(weights, values),
                        "monotone_share": number(monotone_share(weights, values)),
                        "sparsity": None if gaps_M is None else number(gaps_M[index]),
                        **_with_intervals(samples, regret),
                    }
                )
    return found


def equal_kl(samples: BootstrapSamples) -> list[Json]:
    """Objectives at KL levels that all methods of a unit reach, by weight vector."""
    found = []
    for unit, methods in groups_of(samples.data).items():
        for sweep in sweeps(samples, methods):
            for method in sweep.by_method:
                reached = objectives_at(samples, sweep, method)
                if reached is None:
                    continue
                vector_M = samples.weights_VM[sweep.by_method[method][0]]
                for level, values_M in zip(*reached, strict=True):
                    found.append(
                        {
                            "rule": method,
                            "unit": unit,
                            "weights": sweep.weights,
                            "kl_per_token": number(level),
                            "objectives": dict(zip(samples.objectives, map(number, values_M), strict=True)),
                            "weighted": number(samples.normalised(values_M) @ vector_M),
                        }
                    )
    return found


def win_rates(samples: BootstrapSamples) -> list[Json]:
    """By pair of methods and objective: prompts won, tied and lost at equal agent temperature and weights.

    The base has neither, so it is compared with every variant of the other method.
    """
    found = []
    for method, against in pairs_of(samples.data):
        pairs: dict[float, dict[tuple[int, int], None]] = {}
        for match in matches(samples, method, against):
            pairs.setdefault(match.agent_temperature, {})[match.ours, match.theirs] = None
        for temperature, matched in pairs.items():
            for name, judge in samples.judges.items():
                scores_VP = samples.data.by_prompt(samples.data.scores_by_judge[judge])
                lead = np.concatenate([scores_VP[ours] - scores_VP[theirs] for ours, theirs in matched])
                tie = TIE * float(np.abs(scores_VP).max())
                found.append(
                    {
                        "rule": method,
                        "against": against,
                        "objective": name,
                        "agent_temperature": temperature,
                        "wins": int((lead > tie).sum()),
                        "ties": int((abs(lead) <= tie).sum()),
                        "losses": int((lead < -tie).sum()),
                    }
                )
    return found


def number(value: Any) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if value is not None and np.isfinite(value) else None
