"""What the numbers come to in a sentence, said in the same words whoever wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

METRICS = {
    "hypervolume": "By hypervolume",
    "mip": "By mean inner product",
    "worst_principal": "By its worst principal",
    "equal_kl": "At equal KL to the base",
}


def reading(differences: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
    """A sentence a metric: what the first rule is better than, worse than, and not told apart from.

    A difference counts where its interval leaves 0 out.
    """
    lines = []
    for metric, words in METRICS.items():
        chosen = _overall([each for each in differences if each["metric"] == metric])
        if chosen:
            lines.append(f"{words}, {chosen[0]['rule']} is {_verdict(chosen)} ({confidence:.0%} intervals).")
    return lines


def _overall(differences: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the first rule: by other rule the difference over all agent temperatures, which stands last."""
    first = differences[0]["rule"] if differences else None
    last = {each["against"]: each for each in differences if each["rule"] == first and each["interval"]}
    return list(last.values())


def _verdict(differences: Iterable[Mapping[str, Any]]) -> str:
    said: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    for each in differences:
        low, high = each["interval"]
        verdict = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        said[verdict].append(f"{each['against']} ({each['difference']:+.3f}, {low:+.3f} to {high:+.3f})")
    return "; ".join(f"{verdict} {', '.join(rules)}" for verdict, rules in said.items() if rules)
