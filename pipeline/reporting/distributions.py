"""Distributions of a run's numbers, for ridge charts and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.reporting.tally import Floats, Tally

MAX_BINS = 40
SHOWN_VALUES = 80  # up to so many values, each one is drawn
QUANTILES = (0.05, 0.5, 0.95)
RESIDUAL_FLOOR = 1e-16


@dataclass(frozen=True, slots=True)
class Quantity:
    """A column of numbers and how to show it.

    Args:
        column: its name in `Batch.numbers`.
        label, unit: what the chart says.
        is_log: whether the axis shows the decimal logarithm.
        is_count: whether the values are integers, so that bins have whole widths.
        is_varied: whether it is left out where all values are the same.
    """

    column: str
    label: str
    unit: str
    is_log: bool = False
    is_count: bool = False
    is_varied: bool = False


def shown_quantities(
    principal_names: Sequence[str], judges: Mapping[str, str], *, has_row_weights: bool
) -> list[Quantity]:
    """The quantities to draw, in order; one that no row has is left out later.

    Args:
        principal_names: of the run.
        judges: by name, the label of the score.
        has_row_weights: whether rows bring their own weights.
    """
    weighted = principal_names if has_row_weights else ()
    return [
        *(Quantity(f"rewards.{name}", f"Reward of {name}", "nats per answer") for name in principal_names),
        *(Quantity(f"weights.{name}", f"Weight of {name}", "of a row", is_varied=True) for name in weighted),
        *(Quantity(f"scores.{name}", f"Judge: {label}", "score") for name, label in judges.items()),
        Quantity("num_tokens", "Length", "tokens", is_count=True),
        Quantity("kl_per_token", "KL to the base", "nats per token"),
    ]


HEALTH = (
    Quantity("max_residual", "Largest residual of an answer", "log scale", is_log=True),
    Quantity("solver_steps", "Solver steps per token", "mean over an answer"),
    Quantity("covered_mass", "Base probability covered by the candidates", "mean over an answer"),
)


def describe_distribution(tally: Tally, quantity: Quantity) -> dict[str, Any] | None:
    """Histograms by rule over common bins. Quantiles are of the sampled rows, means of all; None without values."""
    values_by_rule = {rule: tally.sample.values(rule, quantity.column) for rule in tally.by_rule}
    values_by_rule = {rule: _on_axis(values, quantity) for rule, values in values_by_rule.items() if values.size}
    if not values_by_rule:
        return None
    everything = np.concatenate(list(values_by_rule.values()))
    if quantity.is_varied and everything.min() == everything.max():
        return None
    edges = _edges(everything, quantity, len(values_by_rule))
    groups = [
        _group(rule, values, edges, tally.by_rule[rule].mean(quantity.column), quantity)
        for rule, values in values_by_rule.items()
    ]
    outside = int(((everything < edges[0]) | (everything > edges[-1])).sum())
    return {
        "label": quantity.label,
        "unit": quantity.unit,
        "log": quantity.is_log,
        "low": float(edges[0]),
        "high": float(edges[-1]),
        "outside": outside,
        "ends": ("5 %", "95 %"),
        "groups": groups,
    }


def _on_axis(values: Floats, quantity: Quantity) -> Floats:
    return np.log10(np.maximum(values, RESIDUAL_FLOOR)) if quantity.is_log else values


def _edges(values: Floats, quantity: Quantity, num_groups: int) -> Floats:
    """Bin edges over the values; far outliers are left off the axis, and their number is shown."""
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = np.quantile(values, [0.01, 0.99])
    if high - low > 3 * (inner_high - inner_low) > 0:
        low, high = float(inner_low), float(inner_high)
    if low == high:
        return np.array([low - 0.5, high + 0.5])
    # Rice's rule: twice the cube root of the number of values
    bins = int(np.clip(np.ceil(2 * (values.size / num_groups) ** (1 / 3)), 5, MAX_BINS))
    if quantity.is_count:
        width = max(1, int(np.ceil((high - low + 1) / bins)))
        low = np.floor(low) - 0.5
        return np.arange(low, high + width, width, dtype=np.float64)
    return np.linspace(low, high, bins + 1)


def _group(rule: str, values: Floats, edges: Floats, mean: float | None, quantity: Quantity) -> dict[str, Any]:
    counts, _ = np.histogram(values, edges)
    low, median, high = (float(value) for value in np.quantile(values, QUANTILES))
    return {
        "rule": rule,
        "n": int(values.size),
        "counts": counts.tolist(),
        "low": low,
        "median": median,
        "high": high,
        "mean": None if quantity.is_log else mean,
        "values": sorted(values.tolist()) if values.size <= SHOWN_VALUES else [],
    }
