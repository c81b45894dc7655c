"""Sentences that sum up an evaluation, in the same words whichever rule is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SMALLEST = 1e-12  # less is rounding
METRICS = {
    "hypervolume": "By hypervolume",
    "mip": "By mean inner product",
    "worst_principal": "By its worst principal",
    "equal_kl": "At equal KL to the base",
    "equal_length": "At equal length",
}


def reading(differences: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
    """One sentence per metric: which rules the first rule is better than, worse than, or not distinguishable from.

    A difference counts where its p value, adjusted for all pairs of the metric, is below the level of the intervals.
    """
    lines = []
    for metric, words in METRICS.items():
        chosen = _overall([each for each in differences if each["metric"] == metric])
        if chosen:
            verdict = _verdict(chosen, 1 - confidence)
            lines.append(f"{words}, {chosen[0]['rule']} is {verdict} ({confidence:.0%} intervals).")
    return lines


def _overall(differences: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first rule's difference from each other rule over all agent temperatures, which is the last one listed."""
    first = differences[0]["rule"] if differences else None
    last = {each["against"]: each for each in differences if each["rule"] == first and each["interval"]}
    return list(last.values())


def _verdict(differences: Iterable[Mapping[str, Any]], level: float) -> str:
    said: dict[str, list[str]] = {"better than": [], "worse than": [], "not distinguishable from": []}
    for each in differences:
        low, high = each["interval"]
        is_clear = each["p_adjusted"] is not None and each["p_adjusted"] < level
        verdict = "not distinguishable from"
        if is_clear:
            verdict = "better than" if each["difference"] > 0 else "worse than"
        digits = decimals(each["difference"], low, high)
        shown = f"{each['difference']:+.{digits}f}, {low:+.{digits}f} to {high:+.{digits}f}"
        said[verdict].append(f"{each['against']} ({shown})")
    return "; ".join(f"{verdict} {', '.join(rules)}" for verdict, rules in said.items() if rules)


def decimals(*values: float | None) -> int:
    """How many decimals numbers are shown with: 3, or as many as show three digits of the largest where it is small.

    Hypervolumes are products of small ranges; shown as +0.000, a clear difference would say nothing.
    """
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return 3 if largest >= 0.01 or largest < SMALLEST else 2 - math.floor(math.log10(largest))
