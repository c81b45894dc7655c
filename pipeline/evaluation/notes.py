"""Notes on an evaluation: how its numbers were made, and what limits them."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.evaluation.bootstrap import BootstrapSamples
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.equal_kl import sweeps
from pipeline.evaluation.judges.interface import JudgeConfig
from pipeline.evaluation.panel import Panel


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
        "are paired and not adjusted for their number.",
        "Reference point of the hypervolume: "
        + ("given" if config.evaluation.reference_point else "the lowest mean of everything compared, less a tenth")
        + (". " if config.evaluation.reference_point else " of the objective's range. ")
        + "Hypervolumes from different reference points do not compare; noise widens a front, so that resampled "
        "hypervolumes lie above the estimate.",
        "Objectives are normalised from 0, the lowest mean of everything compared, to 1, the highest; weights sum to "
        "1. The base uses no weights: its metrics are means over all weight vectors.",
        "All rules share batches, so tokens per second are those of the whole run.",
    ]
    found += [
        f"The judge {judge} of {principal} is no independent judge: {why}."
        for principal, judge, why in overlaps(config, panel, models)
    ]
    if samples.data.num_left_out:
        found.append(
            f"{samples.data.num_left_out:,} prompts are left out: some rule has no answer or no score for them."
        )
    if len([rule for rule in samples.data.rules if rule.uses_principals]) > 1 and not _has_equal_kl(samples):
        found.append("No KL is reached by all rules with the same weights, so there is no comparison at equal KL.")
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


def _has_equal_kl(samples: BootstrapSamples) -> bool:
    return any(sweep.levels(samples.kl_SV[0]) is not None for sweep in sweeps(samples))
