"""`cage evaluate`: run an evaluation and print its comparison of rules."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.commands.exports import as_csv, as_json, as_latex, check_outputs, write_outputs
from jobs.commands.text import indented, number, printable, shown_path, table
from jobs.logs import command_log, show_result
from pipeline.config.files import dump_config, load_as
from pipeline.errors import ConfigurationError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.trackers import Tracker, log_evaluation, open_tracker

if TYPE_CHECKING:
    from pipeline.stages.evaluate import Evaluation


COLUMNS = (
    "share: the hypervolume as a share of the box from the reference point to the best mean of each objective; "
    "MIP: weights times normalised objectives, the mean over all points; worst: the lowest normalised objective of a "
    "point, without those of weight 0, the mean over all points; KL: to the base, in nats per token"
)

# what a line of the CSV file is of, the columns first
KEYS = ("rule", "against", "objective", "unit", "agent_temperature", "weights", "at_kl")
NO_VALUES = (*KEYS, "uses_temperature", "variant")


def run_evaluate(
    config_file: Path,
    overrides: list[str],
    *,
    print_config: bool,
    is_new_run: bool = False,
    may_extend: bool = False,
    is_verbose: bool,
    outputs: Sequence[Path] = (),
    log_to: str | None = None,
) -> None:
    """Read the configuration, run the evaluation to its end, say what it found, and write what is asked for."""
    check_outputs(outputs, WRITERS)
    tracker, package = None, None
    if log_to is not None:
        if log_to not in list(Tracker):
            raise ConfigurationError(f"--log-to must be {' or '.join(Tracker)}; got {log_to}")
        tracker = Tracker(log_to)
        package = open_tracker(tracker)
    config = load_as(EvaluateConfig, config_file, overrides)
    if print_config:
        sys.stdout.write(dump_config(config))
        return
    from jobs.commands.status import status_fields
    from pipeline.hub.embedded import default_cache_folder
    from pipeline.reporting.page import REPORT, write_report
    from pipeline.stages.evaluate import evaluate

    cache_folder = default_cache_folder(os.environ)
    with command_log() as out:
        evaluation = evaluate(
            config, cache_folder, out, is_verbose=is_verbose, may_begin_beside=is_new_run, may_extend=may_extend
        )
    if evaluation.was_run or not evaluation.run.store.names(REPORT):
        write_report(evaluation.run)
    write_outputs(outputs, WRITERS, evaluation.metrics)
    notes = [] if evaluation.was_run else ["nothing to do: the evaluation is complete"]
    logged = []
    if tracker is not None and package is not None:
        name = evaluation.run.store.path.rstrip("/").rpartition("/")[2]
        log_evaluation(tracker, package, evaluation.metrics, name=name)
        logged.append(f"  logged    to {tracker}")
    show_result(
        lambda: "\n".join([*notes, describe_evaluation(evaluation), *logged]),
        was_run=evaluation.was_run,
        **status_fields(evaluation.run),
        prompts=evaluation.metrics["num_prompts"],
        answers=evaluation.metrics["num_answers"],
    )


def describe_evaluation(evaluation: Evaluation) -> str:
    """A table by rule, the reference point, what it comes to, and where the files are."""
    metrics = evaluation.metrics
    path = shown_path(evaluation.run.store.path)
    reference = ", ".join(f"{printable(name)} {value:.4g}" for name, value in metrics["reference_point"].items())
    lines = [
        f"{metrics['num_prompts']:,} prompts, {metrics['num_answers']:,} answers, "
        f"{number(metrics['tokens_per_second'], 1)} tokens/s",
        "",
        _rules(metrics),
        indented(COLUMNS),
        f"  reference point of the hypervolume: {reference}",
        "",
        *(indented(sentence) for sentence in metrics["reading"]),
        "",
        *(indented(note) for note in metrics["notes"]),
        "",
        f"  answers   {path}/part-*.parquet",
        f"  scores    {path}/_scores/part-*.parquet",
        f"  metrics   {path}/_metrics.json",
        f"  report    {path}/_report.html",
    ]
    return "\n".join(lines)


def _rules(metrics: dict[str, Any]) -> str:
    return table(*_rules_table(metrics))


def _rules_table(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["rule, temperature", "hypervolume", "interval", "share", "MIP", "interval", "worst", "KL", "tokens"]
    entries = [(entry["rule"], entry) for entry in metrics["by_temperature"]]
    entries += [(rule, entry) for rule, entry in metrics["rules"].items()]
    largest = max(entry["hypervolume"] for _, entry in entries)
    digits = max(1, 2 - math.floor(math.log10(largest))) if largest > 0 else 1  # three significant digits
    rows = []
    for rule, entry in sorted(entries, key=lambda each: list(metrics["rules"]).index(each[0])):
        temperature = entry.get("agent_temperature")
        rows.append(
            [
                f"{rule} {'all' if temperature is None else f'{temperature:g}'}",
                number(entry["hypervolume"], digits),
                _interval(entry["hypervolume_interval"], digits),
                number(entry["normalised_hypervolume"]),
                number(entry["mip"]),
                _interval(entry["mip_interval"]),
                number(entry["worst_principal"]),
                number(entry["kl_per_token"]),
                number(entry["num_tokens"], 1),
            ]
        )
    return head, rows


def _interval(interval: list[float] | None, digits: int = 3) -> str:
    return "-" if interval is None else f"{number(interval[0], digits)} to {number(interval[1], digits)}"


def _as_csv(metrics: dict[str, Any]) -> str:
    """A line per number: what it is of, its value, its interval, and of differences their p values.

    Means of objectives and of judges have a prefix, because a principal may be called as a metric is.
    """
    head = ["table", *KEYS, "name", "value", "low", "high"]
    tables = {
        "rules": [{"rule": rule, **entry} for rule, entry in metrics["rules"].items()],
        "by_temperature": metrics["by_temperature"],
        "points": [_flat_point(point) for point in metrics["points"]],
        "equal_kl": [
            {**each, **_prefixed("objectives", each["objectives"]), "at_kl": each["kl_per_token"]}
            for each in metrics["equal_kl"]
        ],
        "control": metrics["control"],
        "win_rates": metrics["win_rates"],
    }
    rows: list[dict[str, Any]] = []
    for table_name, entries in tables.items():
        for entry in entries:
            own = {key.removesuffix("_interval"): ends for key, ends in entry.items() if key.endswith("_interval")}
            ends = {**entry.get("ends", {}), **own}
            for key, value in entry.items():
                if isinstance(value, int | float) and key not in NO_VALUES:
                    rows.append({**_key_of(entry), "table": table_name, "name": key, **_valued(value, ends.get(key))})
    for each in metrics["differences"]:
        interval = {"name": each["metric"], **_valued(each["difference"], each["interval"])}
        rows.append({**_key_of(each), "table": "differences", **interval, **each})
    return as_csv([*head, "p", "p_adjusted", "prompts_for_this_difference"], rows)


def _flat_point(point: dict[str, Any]) -> dict[str, Any]:
    ends = {"objectives": point["intervals"], "scores": point["score_intervals"]}
    flat = {key: each for kind in ends for key, each in _prefixed(kind, point[kind]).items()}
    return {
        **point,
        **flat,
        "ends": {key: each for kind in ends for key, each in _prefixed(kind, ends[kind]).items()},
    }


def _prefixed(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind}.{name}": value for name, value in values.items()}


def _key_of(entry: dict[str, Any]) -> dict[str, Any]:
    weights = entry.get("weights")
    shown = {key: entry.get(key) for key in KEYS if key != "weights"}
    return {**shown, "weights": "" if not weights else json.dumps(weights)}


def _valued(value: float | None, interval: list[float] | None) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high}


def _as_latex(metrics: dict[str, Any]) -> str:
    """A table for booktabs: the rules at each agent temperature and over all, as they are printed."""
    return as_latex(*_rules_table(metrics))


WRITERS = {".json": as_json, ".csv": _as_csv, ".tex": _as_latex}
