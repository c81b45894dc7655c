"""The report of a training: what each principal is worth, and the lines that use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.training.checks import standard_error
from pipeline.training.data import TrainingData
from pipeline.training.settings import Loss, TrainConfig


def best_reference(facts: Mapping[str, Any]) -> str:
    """The reference of `kind: arm` under which the reward orders held-out pairs better."""
    if facts["loss"] == Loss.DPO or facts["held_out"] is None:
        return "backbone"
    found = facts["held_out"]["accuracy"]
    return "none" if found["none"] > found["backbone"] else "backbone"


def describe_result(facts: Mapping[str, Any]) -> str:
    """One line about a trained principal."""
    trained = f"{facts['name']}: {facts['pairs']:,} pairs, {facts['steps']:,} steps"
    held_out = facts["held_out"]
    if held_out is None:
        return f"{trained}; no pairs were held out"
    found, reference = held_out["accuracy"], best_reference(facts)
    error = standard_error(found[reference], held_out["pairs"])
    return (
        f"{trained}; on {held_out['pairs']:,} held-out pairs accuracy {found[reference]:.3f} ± {error:.3f} with "
        f"reference {reference} ({found['untrained']:.3f} before training, {found['shorter']:.3f} by the shorter "
        f"one), margin {held_out['margin'][reference]:.3g} nats, calibration error "
        f"{held_out['calibration']['expected_error']:.3f}"
    )


def configuration_lines(config: TrainConfig, results: Sequence[Mapping[str, Any]]) -> str:
    """The part of a configuration that uses the principals."""
    weight = f"{1 / len(results):.3g}"
    lines = ["base:", f"  model: {config.base.model}", "principals:"]
    for facts in results:
        name, reference = facts["name"], best_reference(facts)
        kind = "tuned_pair" if facts["loss"] == Loss.DPO else "arm"
        adapter = f"{config.output.path.rstrip('/')}/{name}"
        lines.append(f"  {name}: {{kind: {kind}, adapter: {adapter}, reference: {reference}, weight: {weight}}}")
    return "\n".join(lines)


def render_report(config: TrainConfig, data: TrainingData, results: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown."""
    parts = ["# Trained principals", ""]
    parts += [f"- {describe_result(facts)}" for facts in results]
    parts += ["", "## In a configuration", "", "```yaml", configuration_lines(config, results), "```", ""]
    for facts in results:
        if facts["held_out"] is not None:
            parts += [f"## {facts['name']}", "", *_measurements(facts["held_out"]), *_examples(facts["held_out"])]
    parts += ["## Data", "", f"- {len(data.train):,} pairs to train on, {len(data.held_out):,} held out, by prompt"]
    parts += [f"- {line}" for line in (*data.drops.describe(), *data.notes)]
    return "\n".join(parts) + "\n"


def _measurements(held_out: Mapping[str, Any]) -> list[str]:
    names = {
        "none": "trained, reference none: log p(answer)",
        "backbone": "trained, reference backbone: log p(answer) - log p_backbone(answer)",
        "untrained": "backbone alone",
        "shorter": "the shorter answer",
    }
    lines = ["| what orders the pairs | right |", "|---|---|"]
    lines += [f"| {text} | {held_out['accuracy'][key]:.3f} |" for key, text in names.items()]
    lines += ["", f"Loss {held_out['loss']:.4g}. Calibration, of the probability that the loss means:", ""]
    lines += ["| confidence | right | pairs |", "|---|---|---|"]
    bins = held_out["calibration"]["bins"]
    lines += [f"| {row['confidence']:.3f} | {row['right']:.3f} | {row['pairs']:,} |" for row in bins]
    return [*lines, ""]


def _examples(held_out: Mapping[str, Any]) -> list[str]:
    lines = ["Held-out pairs with the widest margins, right and wrong (nats):", ""]
    for each in held_out["examples"]:
        lines += [
            f"- {each['margin']:+.3g}: {each['prompt']}",
            f"    - better: {each['better']}",
            f"    - worse: {each['worse']}",
        ]
    return [*lines, ""]
