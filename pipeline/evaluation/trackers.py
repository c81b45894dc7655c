"""Hand the results of an evaluation to MLflow or to Weights & Biases, where their packages are installed."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from types import ModuleType
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.quoting import one_line


class Tracker(StrEnum):
    """Where results are kept beside the run."""

    MLFLOW = "mlflow"
    WANDB = "wandb"


PROJECT = "cage"
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-. /]+")  # MLflow allows no other characters in the name of a metric


def open_tracker(tracker: Tracker) -> ModuleType:
    """The tracker's package. Raises ConfigurationError where it is not installed, by name."""
    try:
        return importlib.import_module(tracker)
    except ImportError:
        raise ConfigurationError(
            f"--log-to {tracker} needs the package {tracker}: install cage-align with the extra `{tracker}`"
        ) from None


def log_evaluation(tracker: Tracker, package: ModuleType, metrics: Mapping[str, Any], *, name: str) -> None:
    """Log a finished evaluation as one run of the tracker.

    Where it is kept is the tracker's to say: MLflow reads MLFLOW_TRACKING_URI, Weights & Biases WANDB_MODE.

    Args:
        tracker: which one.
        package: what `open_tracker` returned.
        metrics: what _metrics.json holds.
        name: of the run.

    Raises:
        ConfigurationError: the tracker does not take them, such as for an address that it cannot reach.
    """
    try:
        _LOGGERS[tracker](package, metrics, name)
    except Exception as error:  # whatever the tracker's code raises
        raise ConfigurationError(
            f"{tracker} did not take the results ({type(error).__name__}: {one_line(error)})"
        ) from error


def named_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number of every rule, as "rule/metric", and at its agent temperatures as "rule/0.1/metric"."""
    found: dict[str, float] = {}
    for rule, entry in metrics["rules"].items():
        found |= dict(_numbers(_place(rule), entry))
    for entry in metrics["by_temperature"]:
        found |= dict(_numbers(f"{_place(entry['rule'])}/{entry['agent_temperature']:g}", entry))
    return found


def _numbers(place: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in entry.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "agent_temperature":
            yield f"{place}/{key}", float(value)


def _place(rule: str) -> str:
    """A rule in the name of a metric: "linear (answer)" is linear/answer."""
    return NOT_IN_NAMES.sub("", rule.replace(" (", "/").replace(", ", "/"))


def _settings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "cage_run": metrics["run"],
        "objectives": ", ".join(metrics["objectives"]),
        "judges": ", ".join(metrics["judges"]),
        "num_prompts": metrics["num_prompts"],
        "num_answers": metrics["num_answers"],
        "reference_point": json.dumps(metrics["reference_point"]),
    }


def _to_mlflow(mlflow: Any, metrics: Mapping[str, Any], name: str) -> None:
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=name):
        mlflow.log_params(_settings(metrics))
        mlflow.log_metrics(named_numbers(metrics))
        mlflow.log_dict(dict(metrics), "metrics.json")


def _to_wandb(wandb: Any, metrics: Mapping[str, Any], name: str) -> None:
    run = wandb.init(project=PROJECT, name=name, config=_settings(metrics))
    points = [_flat(point) for point in metrics["points"]]
    columns = list(dict.fromkeys(key for point in points for key in point))
    rows = [[point.get(key) for key in columns] for point in points]
    run.log({**named_numbers(metrics), "points": wandb.Table(columns=columns, data=rows)})
    run.finish()


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point with one key for each objective, judge and weight."""
    flat: dict[str, Any] = {}
    for key, value in point.items():
        if isinstance(value, Mapping):
            inner = {f"{key}.{name}": each for name, each in value.items() if not isinstance(each, list)}
            flat |= inner
        elif not isinstance(value, list):
            flat[key] = value
    return flat


_LOGGERS: Mapping[Tracker, Callable[[Any, Mapping[str, Any], str], None]] = {
    Tracker.MLFLOW: _to_mlflow,
    Tracker.WANDB: _to_wandb,
}
