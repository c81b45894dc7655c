"""Variants: the ways in which a run answers every prompt, laid out from the configuration's grid.

A run without a grid has one variant, which takes its weights from the row or from the principals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.sections import Config, RuleName, SimplexConfig


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to answer a prompt. `weights` None: the row's own, or the principals'."""

    rule: RuleName
    agent_temperature: float
    weights: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        weights = None if self.weights is None else dict(self.weights)
        return {"rule": str(self.rule), "agent_temperature": self.agent_temperature, "weights": weights}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Variant:
        return cls(RuleName(tree["rule"]), tree["agent_temperature"], tree["weights"])


def lay_out(config: Config) -> tuple[Variant, ...]:
    """Every variant, each once, in the order rule, agent temperature, weights.

    Under the rule `base` nobody is listened to: neither temperature nor weights change its answers, so it has one
    variant, with the first of each.
    """
    rules = config.grid.rules or (config.decoding.rule,)
    temperatures = config.grid.agent_temperatures or (config.decoding.agent_temperature,)
    vectors = tuple(_weight_vectors(config))
    variants: list[Variant] = []
    for rule in dict.fromkeys(rules):
        is_base = rule is RuleName.BASE
        for temperature in dict.fromkeys(temperatures[:1] if is_base else temperatures):
            for vector in vectors[:1] if is_base else vectors:
                variant = Variant(rule, temperature, vector)
                if variant not in variants:
                    variants.append(variant)
    return tuple(variants)


def _weight_vectors(config: Config) -> Iterator[Mapping[str, float] | None]:
    names = tuple(config.principals)
    weights = config.grid.weights
    if isinstance(weights, SimplexConfig):
        parts = round(1 / weights.step)
        for counts in _compositions(parts, len(names)):
            yield {name: count / parts for name, count in zip(names, counts, strict=True)}
    elif weights:
        for vector in weights:
            yield {name: vector[name] for name in names}
    else:
        yield None


def _compositions(total: int, num_parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `num_parts` whole numbers, the first part falling."""
    if num_parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, num_parts - 1):
            yield (first, *rest)
