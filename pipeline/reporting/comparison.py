"""The comparison of rules in an evaluation: what its charts draw and its tables say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.metrics import SHOWN_LINES, Interval, Metrics, Point, as_number
from pipeline.reporting.text import decimal, plain, visible

MAX_DIGITS = 3


def describe_metrics(metrics: Metrics, principal_names: Sequence[str]) -> dict[str, Any]:
    """Data for the charts (`data`) and rows for the tables."""
    temperatures = _column([point.agent_temperature for point in metrics.points[:SHOWN_LINES]])
    return {
        "data": {
            "objectives": metrics.objectives,
            "reference": metrics.reference_point,
            "points": [_point_data(point) for point in metrics.points],
            "control": _control_pairs(metrics, principal_names),
        },
        "objectives": [visible(name) for name in metrics.objectives],
        "reference": [(visible(name), value) for name, value in metrics.reference_point.items()],
        "points": [
            {**_point_row(point, metrics.objectives), "temperature": temperature}
            for point, temperature in zip(metrics.points, temperatures, strict=False)
        ],
        "num_points": len(metrics.points),
        "rules": _rule_rows(metrics),
        "wins": [_win_row(each) for each in metrics.win_rates[:SHOWN_LINES]],
        "control": table_of(metrics.control),
        "by_temperature": table_of(metrics.by_temperature),
        "equal_kl": table_of(metrics.equal_kl),
        "judges": _judges(metrics.judges),
        "bootstrap": plain(metrics.bootstrap) if metrics.bootstrap else "",
        "notes": [visible(note) for note in metrics.notes],
    }


def table_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Any list of mappings as a table: one column a key, in the order of their first use."""
    if not entries:
        return None
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    columns = [_column([entry.get(key) for entry in entries[:SHOWN_LINES]]) for key in keys]
    return {
        "head": [visible(key).replace("_", " ") for key in keys],
        "numeric": [any(cell["number"] is not None for cell in column) for column in columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "num_rows": len(entries),
    }


def _column(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Cells with their text and the number by which they are sorted; numbers of a column have the same decimals."""
    numbers = [as_number(value) for value in values]
    digits = max((_digits(number) for number in numbers if number is not None), default=0)
    return [
        {"text": plain(value) if found is None else decimal(found, digits), "number": found}
        for value, found in zip(values, numbers, strict=True)
    ]


def _digits(value: float) -> int:
    """The decimals that a number needs, up to MAX_DIGITS."""
    return len(f"{value:.{MAX_DIGITS}f}".rstrip("0").partition(".")[2])


def _point_data(point: Point) -> dict[str, Any]:
    return {
        "rule": point.rule,
        "temperature": point.agent_temperature,
        "weights": point.weights,
        "n": point.num_rows,
        "kl": point.kl_per_token,
        "tokens": point.num_tokens,
        "objectives": {name: [each.mean, each.low, each.high] for name, each in point.objectives.items()},
    }


def _point_row(point: Point, objectives: Sequence[str]) -> dict[str, Any]:
    return {
        "rule": visible(point.rule),
        "weights": ", ".join(f"{visible(name)} {weight:g}" for name, weight in point.weights.items()),
        "num_rows": point.num_rows,
        "objectives": [point.objectives.get(name, Interval(None)) for name in objectives],
        "kl": point.kl_per_token,
        "tokens": point.num_tokens,
        "worst": point.worst_principal,
    }


def _rule_rows(metrics: Metrics) -> dict[str, Any] | None:
    return table_of([{"rule": rule, **values} for rule, values in metrics.rules.items()])


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
    """Which principal's weight should move which objective: as evaluated, or by equal names."""
    told = [[str(entry.get("principal")), str(entry.get("objective"))] for entry in metrics.control]
    by_name = [[name, name] for name in principal_names if name in metrics.objectives]
    pairs = [pair for pair in (told or by_name) if pair[1] in metrics.objectives]
    return [list(pair) for pair in dict.fromkeys(map(tuple, pairs))]


def _judges(judges: Mapping[str, Any]) -> dict[str, Any] | None:
    entries = [
        {"judge": name, **(each if isinstance(each, dict) else {"what": each})} for name, each in judges.items()
    ]
    return table_of(entries)
