"""Traced tokens for the token view: what each shows, and the CSS classes that say who paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.text import visible

PALETTE = 8  # colours and underlines in the style sheet
LEVELS = (0.5, 2.0)  # nats paid for a token: below the first a light tint, above the last a strong one


def describe_token(token: Mapping[str, Any], principal_names: Sequence[str]) -> dict[str, Any]:
    """Text, log-probabilities, payments and thresholds in the order of the principals, and CSS classes."""
    payments, thresholds = token.get("payments") or {}, token.get("thresholds") or {}
    paid = [payments.get(name) for name in principal_names]
    return {
        "text": visible(token["text"]).replace("\n", "\\n"),
        "shown": visible(token["text"]).replace("\n", "↵\n"),
        "base": token["base_logprob"],
        "final": token["logprob"],
        "paid": paid,
        "thresholds": [thresholds.get(name) for name in principal_names],
        "classes": _classes(paid),
    }


def _classes(paid: Sequence[float | None]) -> str:
    """`pJ`: the largest payer; `hL`: the level of all payments; `qJ sT`: the second payer and its share in tenths."""
    amounts = [amount or 0.0 for amount in paid]
    total = sum(amounts)
    if total <= 0:
        return "tok"
    first, *others = sorted(range(len(amounts)), key=lambda j: -amounts[j])
    level = 1 + sum(total >= limit for limit in LEVELS)
    classes = f"tok p{first % PALETTE} h{level}"
    if others and amounts[others[0]] > 0:
        share = amounts[others[0]] / (amounts[first] + amounts[others[0]])
        classes += f" q{others[0] % PALETTE} s{max(1, round(10 * share))}"
    return classes
