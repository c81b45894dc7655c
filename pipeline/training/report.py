"""The report of a training: what each principal is worth, and the lines that use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.training.checks import standard_error
from pipeline.training.data import TrainingData
from pipeline.training.settings import Loss, TrainConfig

KIND_BY_LOSS = {
    Loss.ARM: "arm",
    Loss.DPO: "tuned_pair",
    Loss.PREFERENCE_ARM: "preference_arm",
    Loss.VALUE: "value",
}


def best_reference(held_out: Mapping[str, Any] | None, loss: str) -> str:
    """The reference of a principal under which its reward orders held-out pairs better."""
    if loss == Loss.DPO or held_out is None:
        return "backbone"
    found = held_out["accuracy"]
    return "none" if found["none"] > found["backbone"] else "backbone"


def describe_results(facts: Mapping[str, Any]) -> list[str]:
    """One line about each objective of a trained adapter."""
    return [_describe(facts, objective) for objective in facts["objectives"]]


def _describe(facts: Mapping[str, Any], objective: str) -> str:
    held_out = facts["held_out"].get(objective)
    trained = f"{objective}: {facts['pairs']:,} pairs, {facts['steps']:,} steps"
    if held_out is None:
        return f"{trained}; no pairs were held out"
    if facts["loss"] == Loss.VALUE:
        return f"{trained}; {_describe_values(held_out)}"
    found, reference = held_out["accuracy"], best_reference(held_out, facts["loss"])
    error = standard_error(found[reference], held_out["pairs"])
    others = "".join(
        f", {each[reference]:.3f} at the vector of {name}" for name, each in held_out.get("other_vectors", {}).items()
    )
    return (
        f"{trained}; on {held_out['pairs']:,} held-out pairs accuracy {found[reference]:.3f} ± {error:.3f} with "
        f"reference {reference} ({found['untrained']:.3f} before training, {found['shorter']:.3f} by the shorter "
        f"one{others}), margin {held_out['margin'][reference]:.3g} nats, calibration error "
        f"{held_out['calibration']['expected_error']:.3f}"
    )


def _describe_values(held_out: Mapping[str, Any]) -> str:
    explained, pairs = held_out["explained"], held_out["pairs"]
    right = held_out["accuracy"].get("value")
    of_pairs = "" if right is None else f", {right:.3f} ± {standard_error(right, pairs):.3f} of {pairs:,} pairs right"
    return (
        f"on {held_out['answers']:,} held-out answers the value explains {explained['end']:.3f} of the variance of "
        f"returns at the end, {explained['middle']:.3f} half way and {explained['prompt']:.3f} before the answer"
        f"{of_pairs}"
    )


def configuration_lines(config: TrainConfig, results: Sequence[Mapping[str, Any]]) -> str:
    """The part of a configuration that uses the principals."""
    weight = f"{1 / sum(len(facts['objectives']) for facts in results):.3g}"
    lines = ["base:", f"  model: {config.base.model}", "principals:"]
    for facts in results:
        kind = KIND_BY_LOSS[Loss(facts["loss"])]
        adapter = f"{config.output.path.rstrip('/')}/{facts['name']}"
        for objective in facts["objectives"]:
            own = f", objective: {objective}" if kind == "preference_arm" else ""
            if kind != "value":
                own += f", reference: {best_reference(facts['held_out'].get(objective), facts['loss'])}"
            section = f"kind: {kind}, adapter: {adapter}{own}, weight: {weight}"
            lines.append(f"  {objective}: {{{section}}}")
    return "\n".join(lines)


def render_report(config: TrainConfig, data: TrainingData, results: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown."""
    parts = ["# Trained principals", ""]
    parts += [f"- {line}" for facts in results for line in describe_results(facts)]
    parts += ["", "## In a configuration", "", "```yaml", configuration_lines(config, results), "```", ""]
    for facts in results:
        for objective, held_out in facts["held_out"].items():
            if facts["loss"] != Loss.VALUE:
                parts += [f"## {objective}", "", *_measurements(held_out), *_examples(held_out)]
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
