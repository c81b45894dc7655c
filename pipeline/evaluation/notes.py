"""Notes on an evaluation: how its numbers were made, and what limits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.evaluation.bootstrap import BootstrapSamples
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.equal_kl import groups_of, sweeps
from pipeline.evaluation.judges.interface import JudgeConfig
from pipeline.evaluation.metrics import hypervolume
from pipeline.evaluation.pairs import pairs_of
from pipeline.evaluation.panel import Panel
from pipeline.evaluation.significance import smallest_p_value


def notes(config: EvaluateConfig, panel: Panel, models: Mapping[str, str], samples: BootstrapSamples) -> list[str]:
    """Sentences for the report and the terminal.

    Args:
        config: the evaluation.
        panel: its judges.
        models: identities of the run's models, by their place in the configuration.
        samples: the resampled means.
    """
    found = [
        f"Every mean is over the same {len(samples.data.row_ids):,} prompts; intervals are bootstrap intervals over "
        f"prompts ({samples.confidence:.0%}, {config.evaluation.bootstrap.samples:,} samples), differences "
        "are paired."
        + (" Each prompt's samples are resampled, too." if samples.data.num_samples > 1 else "")
        + " p values are adjusted (Holm) for all pairs that one metric compares in one way."
        + _too_few_prompts(samples),
        "Reference point of the hypervolume: "
        + ("given" if config.evaluation.reference_point else "the lowest mean of everything compared, less a tenth")
        + (". " if config.evaluation.reference_point else " of the objective's range. ")
        + "Hypervolumes from different reference points do not compare; noise widens a front, so that resampled "
        "hypervolumes and spreads lie above the estimate.",
        "Objectives are normalised from 0, the lowest mean of everything compared, to 1, the highest; weights sum to "
        "1. The base uses no weights: its metrics are means over all weight vectors.",
        "All rules share batches, so tokens per second are those of the whole run.",
    ]
    found += [
        f"The judge {judge} of {principal} is no independent judge: {why}."
        for principal, judge, why in overlaps(config, panel, models)
    ]
    found += _of_objectives(config, samples)
    if samples.data.num_left_out:
        found.append(
            f"{samples.data.num_left_out:,} prompts are left out: some rule has no answer or no score for them."
        )
    found += _of_empty_answers(samples)
    found += _of_some_weights(samples)
    if (units := _without_equal_kl(samples)) is not None:
        found.append(
            f"No KL is reached by all rules {units}with the same weights, so there is no comparison at equal KL."
        )
    if straight := _straight_curves(samples):
        found.append(_of_straight_curves(samples, straight))
    if len({variant.unit for variant in samples.data.variants if variant.rule.uses_principals}) > 1:
        found.append(
            "Rules are compared at equal KL among those of one unit, and two by two across units. The KL of a game "
            "over blocks or answers is to the base's proposals, and by the answer's tokens: an upper bound of that "
            "of the answers to all that the base could have written."
        )
    return found


def overlaps(config: EvaluateConfig, panel: Panel, models: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(principal, judge, why) of every objective whose judge is itself part of what the rules optimise."""
    found = []
    for principal, name in config.objectives.items():
        judge = config.evaluation.judges[name]
        reason = _not_independent(judge, principal)
        source = panel.sources.get(name)
        places = [place for place, identity in models.items() if source is not None and identity == source.identity]
        if places:
            reason = f"it is the model {', '.join(places)} of the run"
        if reason:
            found.append((principal, name, reason))
    return found


def _not_independent(judge: JudgeConfig, principal: str) -> str:
    measured = judge.measured_principal
    if measured is None:
        return ""
    whose = "its own reward" if measured == principal else f"the reward of the principal {measured}"
    return f"it is {whose}, which the rules optimize"


def _too_few_prompts(samples: BootstrapSamples) -> str:
    """A sentence where no p value can be below the level of the intervals."""
    num_prompts, level = len(samples.data.row_ids), 1 - samples.confidence
    smallest = smallest_p_value(num_prompts)
    if num_prompts < 2 or smallest < level:
        return ""
    return (
        f" {num_prompts} prompts give no p value below {smallest:g}, so that no rule can be told from another one at "
        f"a level of {level:.2g}: give more prompts."
    )


def _of_objectives(config: EvaluateConfig, samples: BootstrapSamples) -> list[str]:
    """Sentences where metrics are of fewer objectives than there are principals, or say nothing."""
    found = []
    if without := [name for name in config.principals if name not in samples.judges]:
        found.append(
            f"No judge measures {', '.join(without)} (evaluation.objectives): all metrics are of "
            f"{', '.join(samples.objectives)} alone, with weights that sum to 1 over them."
        )
    if len(samples.data.variants) > 1:
        ends = zip(samples.objectives, samples.low_M, samples.high_M, strict=True)
        found += [
            f"The judge {samples.judges[name]} tells nothing apart: every mean of {name} is {low:g}, which counts as "
            "0 where objectives are normalised."
            for name, low, high in ends
            if low == high
        ]
    if hypervolume(samples.means_SVM[0], samples.reference_M) == 0:
        found.append("No mean is above the reference point in every objective, so that all hypervolumes are 0.")
    return found


def _of_empty_answers(samples: BootstrapSamples) -> list[str]:
    """A sentence where answers have no text: many a judge has a good score for them."""
    data = samples.data
    if "empty" not in data.numbers:
        return []
    counts = {method: int(data.numbers["empty"][data.indices(method)].sum()) for method in data.methods}
    if not any(counts.values()):
        return []
    shown = ", ".join(f"{method} {count:,}" for method, count in counts.items() if count)
    return [
        f"{sum(counts.values()):,} answers have no text ({shown}). Judges score them, too: they repeat nothing, and "
        "are not profane."
    ]


def _of_some_weights(samples: BootstrapSamples) -> list[str]:
    """Sentences where the comparison at equal KL lacks weight vectors."""
    found, groups = [], groups_of(samples.data)
    for unit, methods in groups.items():
        levels = [sweep.levels(samples.kl_SV[0]) for sweep in sweeps(samples, methods)]
        num_compared = sum(each is not None for each in levels)
        if 0 < num_compared < len(levels):
            of_unit = f"over {unit}s " if len(groups) > 1 else ""
            found.append(
                f"At equal KL, rules {of_unit}are compared at {num_compared:,} of {len(levels):,} weight vectors: at "
                "the others there is no KL that all of them reach."
            )
    return found


def _straight_curves(samples: BootstrapSamples) -> list[str]:
    """The methods that are compared at equal KL on a line from the base to their only point."""
    found = {
        method: None
        for pair in pairs_of(samples.data)
        if all(samples.data.rule_of(method).uses_principals for method in pair)
        for sweep in sweeps(samples, pair)
        if sweep.base is not None and sweep.levels(samples.kl_SV[0]) is not None
        for method in pair
        if len(sweep.by_method[method]) == 1
    }
    return [method for method in samples.data.methods if method in found]


def _of_straight_curves(samples: BootstrapSamples, methods: Sequence[str]) -> str:
    because, advice = "", ""
    if any(samples.data.rule_of(method).uses_temperature for method in methods):
        because, advice = "with one agent temperature ", "; give grid.agent_temperatures several"
    return (
        f"At equal KL, {because}the curve of {', '.join(methods)} is a straight line from the base to one point, "
        f"below the true curve, which rises ever more slowly{advice}."
    )


def _without_equal_kl(samples: BootstrapSamples) -> str | None:
    """The first unit whose rules share no KL, for a sentence; None where all do."""
    groups = groups_of(samples.data)
    for unit, methods in groups.items():
        if len(methods) > 1 and all(
            sweep.levels(samples.kl_SV[0]) is None for sweep in sweeps(samples, methods) or ()
        ):
            return f"over {unit}s " if len(groups) > 1 else ""
    return None
