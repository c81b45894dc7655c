"""The comparison of rules in an evaluation, as data for charts and rows for tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.inputs.given import as_number
from pipeline.reporting.metrics import SHOWN_LINES, Interval, Metrics, VariantMetrics, as_interval
from pipeline.reporting.text import MINUS, ROUNDING, decimal, plain, visible

SHOWN_DIGITS = 3  # significant ones of a column's largest number
MAX_DECIMALS = 6
HEADS = {
    "num_points": "points",
    "normalised_hypervolume": "normalised hypervolume",
    "mip": "mean inner product (MIP)",
    "kl_per_token": "KL per token",
    "num_tokens": "tokens",
    "equal_kl": "score at equal KL",
    "is_monotone": "monotone",
    "monotone_share": "monotone steps",
    "published_hypervolume": "published hypervolume",
    "unit_hypervolume": "hypervolume of normalised objectives",
    "inverted_generational_distance": "distance to the front (IGD)",
    "pareto_share": "share on the front",
    "kl_per_answer": "KL per answer",
    "cut": "cut",
    "distinct_2": "distinct-2",
    "repetition_3": "repetition of 3 words",
    "p_adjusted": "p, adjusted",
    "prompts_for_this_difference": "prompts needed",
    "smallest_difference_to_find": "smallest difference to find",
}
# What the report says below a table that has the column.
MEANINGS = {
    "hypervolume": "the volume, in the space of objectives, between the reference point and the rule's Pareto front; "
    "its unit is the product of the judges' units.",
    "normalised_hypervolume": "the same as a share of the box from the reference point to the best mean of each "
    "objective: 0 is nothing, 1 is the best of every objective at once.",
    "mip": "each point's weights times its objectives, which are normalised from 0 (the lowest mean of everything "
    "compared) to 1 (the highest); the mean over the points. It rises when a rule gives more to those who have more "
    "weight.",
    "worst_principal": "the lowest normalised objective of a point, without those of principals with weight 0; the "
    "mean over the points.",
    "sparsity": "how far apart neighbouring points of the Pareto front lie: their mean squared distance by "
    "objective, summed over normalised objectives. Less is better: weights then choose among denser compromises.",
    "equal_kl": "the mean inner product at KL levels that all rules reach, read off between agent temperatures.",
    "published_hypervolume": "the same from the reference point of CAGE's public evaluation: the lowest mean of each "
    "objective less 1. It suits scores of reward models, whose unit is about 1.",
    "unit_hypervolume": "that of the objectives normalised from 0 to 1, above 0, as in the same evaluation.",
    "regret": "how much of its normalised objective a principal loses by sharing: where it has all weight, less "
    "where it has some; the mean over points, and in the table of rules over principals. Less is better.",
    "spread": "the diagonal of the box around the normalised front, as a share of that of all objectives' ranges.",
    "inverted_generational_distance": "the mean distance from the front of everything compared to the nearest of the "
    "rule's points, normalised. 0: the rule has that front.",
    "pareto_share": "the share of the rule's points that nothing compared dominates.",
    "kl_per_answer": "nats of KL to the base over a whole answer.",
    "cut": "the share of answers that ended at their length limit.",
    "in_reasoning": "the share of answers that ended within their reasoning.",
    "empty": "the share of answers without text.",
    "distinct_2": "different pairs of words over all pairs of an answer.",
    "repetition_3": "the share of an answer's words in three words that occurred before.",
    "p_adjusted": "two-sided, by Student's t with the bootstrap's standard error, no smaller than 2^(1 - prompts), "
    "and adjusted (Holm) for all pairs that one metric compares in one way.",
    "prompts_for_this_difference": "with so many prompts a difference of this size is found with a chance of 80 %, "
    "at 5 % and by this comparison alone.",
    "smallest_difference_to_find": "the difference that the evaluation's prompts find with a chance of 80 %, at 5 % "
    "and by this comparison alone.",
    "monotone_share": "the share of steps to the next larger weight at which the objective does not fall.",
    "spearman": "the rank correlation of weight and objective: 1 where every larger weight has a higher objective.",
    "is_monotone": "whether the objective never falls as the weight rises.",
}
METRICS = {
    "mip": "mean inner product",
    "worst_principal": "the worst principal",
    "equal_kl": "the score at equal KL",
    "equal_length": "the score at equal length",
}


def describe_metrics(metrics: Metrics, principal_names: Sequence[str]) -> dict[str, Any]:
    """What the section "Comparison of rules" shows: `data` for the charts, everything else for tables and notes.

    Args:
        metrics: of the evaluation.
        principal_names: of the run, to match principals with objectives where the metrics do not.
    """
    shown = metrics.points[:SHOWN_LINES]
    labels = _labels(metrics)
    others = [name for name in metrics.judge_names if name not in _measuring(metrics)]
    temperatures = _column([point.agent_temperature for point in shown], [None] * len(shown))
    points = [
        {**_point_row(point, metrics, others), "temperature": at}
        for point, at in zip(shown, temperatures, strict=True)
    ]
    return {
        "data": {
            "objectives": metrics.objectives,
            "judges": metrics.judge_names,
            "labels": labels,
            "reference": metrics.reference_point,
            "points": [_point_data(point) for point in metrics.points],
            "control": _control_pairs(metrics, principal_names),
            "differences": [_difference_data(each) for each in metrics.differences],
        },
        "columns": [visible(labels[name]) for name in (*metrics.objectives, *others)],
        "reference": [(visible(name), value) for name, value in metrics.reference_point.items()],
        "published": [(visible(name), value) for name, value in metrics.published_reference_point.items()],
        "normalised_from": [(visible(name), _span(ends)) for name, ends in metrics.normalised_from.items()],
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
        "reading": [re.sub(r"-(?=\d)", MINUS, visible(sentence)) for sentence in metrics.reading],
        "notes": [visible(note) for note in metrics.notes],
    }


def _labels(metrics: Metrics) -> dict[str, str]:
    """By judge and by objective the label of its score.

    A judge of which less is better has negated scores, and "minus" says so. An objective has the label of its judge
    in brackets, where _metrics.json says which it is.
    """
    labels = judge_labels(metrics)
    judge_of = {objective: judge for judge, objectives in _measuring(metrics).items() for objective in objectives}
    own = {}
    for name in metrics.objectives:
        judge = judge_of.get(name, name)
        own[name] = labels.get(name, name) if judge == name else f"{name} ({labels.get(judge, judge)})"
    return {**labels, **own}


def judge_labels(metrics: Metrics) -> dict[str, str]:
    """By judge the label of its score."""
    signs = {name: section.get("sign") for name, section in metrics.judges.items() if isinstance(section, dict)}
    names = dict.fromkeys([*metrics.judge_names, *metrics.judges])
    return {name: f"minus {name}" if signs.get(name) == "lower" else name for name in names}


def _measuring(metrics: Metrics) -> dict[str, list[str]]:
    """By judge the objectives that it measures, without judges that measure none."""
    return {
        judge: [str(name) for name in section["measures"]]
        for judge, section in metrics.judges.items()
        if isinstance(section, dict) and isinstance(section.get("measures"), list) and section["measures"]
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
        "head": [HEADS.get(key, visible(key).replace("_", " ")) for key in shown],
        "meanings": [(HEADS.get(key, key.replace("_", " ")), MEANINGS[key]) for key in shown if key in MEANINGS],
        "numeric": [any(cell["number"] is not None for cell in column) for column in columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "num_rows": len(entries),
    }


def _inner(objectives: Any) -> Mapping[str, Any]:
    return objectives if isinstance(objectives, dict) else {}


def _span(ends: Any) -> str:
    return " to ".join(map(plain, ends)) if isinstance(ends, list) else plain(ends)


def _interval_of(key: str) -> str | None:
    """The key of the number whose interval this key holds."""
    if key == "interval":
        return "difference"
    return key.removesuffix("_interval") if key.endswith("_interval") else None


def _column(values: Sequence[Any], intervals: Sequence[Any]) -> list[dict[str, Any]]:
    """Cells with text, interval and the number to sort by; all numbers of a column have the same decimals."""
    found = [as_interval(value, ends) for value, ends in zip(values, intervals, strict=True)]
    digits = _decimals([each.mean for each in found if each.mean is not None])
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


def _decimals(values: Sequence[float]) -> int:
    """How many decimals show SHOWN_DIGITS digits of the largest number, without zeros that all would end in."""
    largest = max(map(abs, values), default=0.0)
    if largest <= ROUNDING:
        return 0
    wanted = min(MAX_DECIMALS, max(1, SHOWN_DIGITS - 1 - math.floor(math.log10(largest))))
    return max(len(f"{value:.{wanted}f}".rstrip("0").partition(".")[2]) for value in values)


def _point_data(point: VariantMetrics) -> dict[str, Any]:
    values = {**point.scores, **point.objectives}
    return {
        "rule": point.rule,
        "temperature": point.agent_temperature,
        "uses_temperature": point.uses_temperature,
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


def _point_row(point: VariantMetrics, metrics: Metrics, judges: Sequence[str]) -> dict[str, Any]:
    nothing = Interval(None)
    values = [point.objectives.get(name, nothing) for name in metrics.objectives]
    return {
        "rule": visible(point.rule),
        "weights": ", ".join(f"{visible(name)} {weight:g}" for name, weight in point.weights.items()),
        "num_rows": point.num_rows,
        "numbers": values + [point.scores.get(name, nothing) for name in judges],
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
