"""The comparison of rules in an evaluation, as data for charts and rows for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.metrics import SHOWN_LINES, Interval, Metrics, VariantMetrics, as_interval, as_number
from pipeline.reporting.text import decimal, plain, visible

MAX_DIGITS = 3
METRICS = {"mip": "mean inner product", "worst_principal": "the worst principal", "equal_kl": "the score at equal KL"}


def describe_metrics(metrics: Metrics, principal_names: Sequence[str]) -> dict[str, Any]:
    """What the section "Comparison of rules" shows: `data` for the charts, everything else for tables and notes.

    Args:
        metrics: of the evaluation.
        principal_names: of the run, to match principals with objectives where the metrics do not.
    """
    shown = metrics.points[:SHOWN_LINES]
    temperatures = _column([point.agent_temperature for point in shown], [None] * len(shown))
    points = [
        {**_point_row(point, metrics), "temperature": at} for point, at in zip(shown, temperatures, strict=True)
    ]
    return {
        "data": {
            "objectives": metrics.objectives,
            "judges": metrics.judge_names,
            "labels": _labels(metrics),
            "reference": metrics.reference_point,
            "points": [_point_data(point) for point in metrics.points],
            "control": _control_pairs(metrics, principal_names),
            "differences": [_difference_data(each) for each in metrics.differences],
        },
        "columns": [visible(name) for name in (*_labels(metrics).values(), *metrics.judge_names)],
        "reference": [(visible(name), value) for name, value in metrics.reference_point.items()],
        "normalised_from": [(visible(name), plain(ends)) for name, ends in metrics.normalised_from.items()],
        "points": points,
        "num_points": len(metrics.points),
        "rules": table_of([{"rule": rule, **values} for rule, values in metrics.rules.items()]),
        "wins": [_win_row(each) for each in metrics.win_rates[:SHOWN_LINES]],
        "differences": table_of(metrics.differences),
        "control": table_of(metrics.control),
        "by_temperature": table_of(metrics.by_temperature),
        "equal_kl": table_of(metrics.equal_kl),
        "judges": _judges(metrics.judges),
        "bootstrap": plain(metrics.bootstrap) if metrics.bootstrap else "",
        "reading": [visible(sentence) for sentence in metrics.reading],
        "notes": [visible(note) for note in metrics.notes],
    }


def _labels(metrics: Metrics) -> dict[str, str]:
    """By objective its label: the name, with the judge that measures it where _metrics.json says which."""
    judges = {
        str(objective): judge
        for judge, section in metrics.judges.items()
        if isinstance(section, dict) and isinstance(section.get("measures"), list)
        for objective in section["measures"]
    }
    return {
        name: f"{name} ({judges[name]})" if judges.get(name, name) != name else name for name in metrics.objectives
    }


def table_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A list of mappings as a table with one column per key, in the order of their first use.

    An interval is shown below its number (`x_interval` below `x`), each objective has a column, and keys without any
    value are left out.
    """
    lines = [{**entry, **_inner(entry.get("objectives"))} for entry in entries[:SHOWN_LINES]]
    keys = dict.fromkeys(key for line in lines for key in line if key != "objectives")
    shown = [
        key for key in keys if _interval_of(key) not in keys and any(line.get(key) is not None for line in lines)
    ]
    if not shown:
        return None
    ends_by_key = {_interval_of(key): key for key in keys}
    columns = [
        _column([line.get(key) for line in lines], [line.get(ends_by_key.get(key, "")) for line in lines])
        for key in shown
    ]
    return {
        "head": [visible(key).replace("_", " ") for key in shown],
        "numeric": [any(cell["number"] is not None for cell in column) for column in columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "num_rows": len(entries),
    }


def _inner(objectives: Any) -> Mapping[str, Any]:
    return objectives if isinstance(objectives, dict) else {}


def _interval_of(key: str) -> str | None:
    """The key of the number whose interval this key holds."""
    if key == "interval":
        return "difference"
    return key.removesuffix("_interval") if key.endswith("_interval") else None


def _column(values: Sequence[Any], intervals: Sequence[Any]) -> list[dict[str, Any]]:
    """Cells with text, interval and the number to sort by; all numbers of a column have the same decimals."""
    found = [as_interval(value, ends) for value, ends in zip(values, intervals, strict=True)]
    digits = max((_digits(each.mean) for each in found if each.mean is not None), default=0)
    return [
        {
            "text": plain(value) if each.mean is None else decimal(each.mean, digits),
            "number": each.mean,
            "interval": None
            if each.low is None or each.high is None
            else f"{decimal(each.low, digits)} to {decimal(each.high, digits)}",
        }
        for value, each in zip(values, found, strict=True)
    ]


def _digits(value: float) -> int:
    """How many decimals a number needs, up to MAX_DIGITS."""
    return len(f"{value:.{MAX_DIGITS}f}".rstrip("0").partition(".")[2])


def _point_data(point: VariantMetrics) -> dict[str, Any]:
    values = {**point.scores, **point.objectives}
    return {
        "rule": point.rule,
        "temperature": point.agent_temperature,
        "weights": point.weights,
        "n": point.num_rows,
        "kl": point.kl_per_token,
        "tokens": point.num_tokens,
        "values": {name: [each.mean, each.low, each.high] for name, each in values.items()},
    }


def _difference_data(entry: Mapping[str, Any]) -> dict[str, Any]:
    found = as_interval(entry.get("difference"), entry.get("interval"))
    return {
        **{key: plain(entry.get(key)) for key in ("rule", "against")},
        "metric": METRICS.get(str(entry.get("metric")), plain(entry.get("metric"))),
        "temperature": as_number(entry.get("agent_temperature")),
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
    }


def _point_row(point: VariantMetrics, metrics: Metrics) -> dict[str, Any]:
    nothing = Interval(None)
    values = [point.objectives.get(name, nothing) for name in metrics.objectives]
    return {
        "rule": visible(point.rule),
        "weights": ", ".join(f"{visible(name)} {weight:g}" for name, weight in point.weights.items()),
        "num_rows": point.num_rows,
        "numbers": values + [point.scores.get(name, nothing) for name in metrics.judge_names],
        "kl": point.kl_per_token,
        "tokens": point.num_tokens,
        "worst": point.worst_principal,
    }


def _win_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    counts = [as_number(entry.get(key)) or 0.0 for key in ("wins", "ties", "losses")]
    total = sum(counts)
    return {
        "rule": plain(entry.get("rule")),
        "against": plain(entry.get("against")),
        "objective": plain(entry.get("objective")),
        "temperature": as_number(entry.get("agent_temperature")),
        "counts": [plain(int(count) if count == int(count) else count) for count in counts],
        "shares": [count / total if total else 0.0 for count in counts],
    }


def _control_pairs(metrics: Metrics, principal_names: Sequence[str]) -> list[list[str]]:
    """Which principal's weight should raise which objective: as evaluated, or by equal names."""
    evaluated = [[str(entry.get("principal")), str(entry.get("objective"))] for entry in metrics.control]
    by_name = [[name, name] for name in principal_names if name in metrics.objectives]
    pairs = [pair for pair in (evaluated or by_name) if pair[1] in metrics.objectives]
    return [list(pair) for pair in dict.fromkeys(map(tuple, pairs))]


def _judges(judges: Mapping[str, Any]) -> dict[str, Any] | None:
    entries = [
        {"judge": name, **(each if isinstance(each, dict) else {"what": each})} for name, each in judges.items()
    ]
    return table_of(entries)
