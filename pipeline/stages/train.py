"""The job that trains principals: preference data in, adapters and a report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from pipeline.config.sections import Transport
from pipeline.errors import ConfigurationError
from pipeline.training.data import Preferences, TrainingData, digest_of_scores, open_preferences, read_data
from pipeline.training.folders import TrainingFolder
from pipeline.training.processes import ALONE, Processes
from pipeline.training.report import render_report
from pipeline.training.settings import Loss, TrainConfig

PREFERENCE = "preference"  # the folder of an adapter for all objectives
PACKAGES = ("trl", "peft", "accelerate")


@dataclass(frozen=True, slots=True)
class Trained:
    """The principals of a training.

    Args:
        folder: where they are.
        data: what they were trained on.
        results: what is stated beside each of them.
        was_trained: whether anything was trained now.
    """

    folder: TrainingFolder
    data: TrainingData
    results: Sequence[Mapping[str, Any]]
    was_trained: bool


def train(
    config: TrainConfig, cache_folder: Path, out: TextIO, *, processes: Processes = ALONE, is_verbose: bool = False
) -> Trained | None:
    """Train a principal for each objective, or go on; what is finished stays.

    Args:
        config: the data, the backbone and how to train.
        cache_folder: where downloaded and converted weights are kept.
        out: where progress is printed.
        processes: that train together; the main one writes, prints and asks a judge.
        is_verbose: whether Ray's own log is shown.

    Returns:
        What was trained; None in a process that is not the main one.

    Raises:
        ConfigurationError: the data, the model or the folder cannot be used.
    """

    def say(line: str) -> None:
        if processes.is_main:
            print(line, file=out, flush=True)

    _check_packages()
    folder = TrainingFolder.at(config.output.path)
    found = open_preferences(config.input)
    from pipeline.training.backbone import find_backbone  # imports torch and transformers: seconds

    backbone = find_backbone(config, cache_folder, now=folder.template_time(), progress=say)
    data = read_data(found, config, backbone.encode, cache_folder, processes)
    folder.begin(_fingerprint(config, found, backbone.source.identity, data), backbone.template_time)
    _describe_data(data, say)
    from pipeline.training.fit import Task, fit  # imports TRL: seconds

    training = config.training
    if training.loss is Loss.PREFERENCE_ARM:
        tasks = [Task(PREFERENCE, backbone, training, data.train, data.held_out, folder, data.objectives)]
    else:
        tasks = [Task(name, backbone, training, *data.of(name), folder, (name,)) for name in data.objectives]
    pending = [task for task in tasks if folder.facts(task.name) is None]
    if config.cluster.transport is Transport.RAY and pending:
        from pipeline.cluster.training import fit_all  # imports ray: seconds

        fit_all(pending, config, say, is_verbose=is_verbose)
    results = [fit(task, say) for task in tasks]
    if not processes.is_main:
        return None
    trained = Trained(folder, data, results, bool(pending))
    folder.write_report(render_report(config, data, results))
    return trained


def _check_packages() -> None:
    for package in PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ConfigurationError(
                f"training needs the package {package}: install cage-align with the extra `train`"
            ) from None


def _fingerprint(config: TrainConfig, found: Preferences, model: str, data: TrainingData) -> dict[str, Any]:
    """Everything that decides the adapters, as dotted fields with plain values."""
    fields = {f"versions.{name}": metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    fields["models.base"] = model
    if found.layout.system is not None:  # also one that was recognised
        fields["input.system"] = found.layout.system
    for file in found.records.files:
        fields[f"input.files.{file.name}"] = f"{file.format} {file.num_rows} rows {file.identity}"
    if config.training.judge is not None:  # a judge may have changed, or have answered less this time
        fields["training.judge.scores"] = digest_of_scores(data)
    return {**fields, **config.fields()}


def _describe_data(data: TrainingData, say: Callable[[str], None]) -> None:
    for name in data.objectives:
        train, held_out = data.of(name)
        say(f"{name}: {len(train):,} pairs to train on, {len(held_out):,} held out, by prompt")
    for line in (*data.drops.describe(), *data.notes):
        say(f"  {line}")
