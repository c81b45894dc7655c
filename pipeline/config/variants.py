"""Variants: the combinations of rule, agent temperature and weights with which a run answers every prompt.

A run without a grid has one variant, which takes its weights from the row or from the principals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cage.rule_names import RuleName
from pipeline.config.sections import Config, SimplexConfig


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to answer a prompt.

    rule: how the base policy and the principals' values become one policy.
    agent_temperature: what moving away from the base policy costs, in the unit of the values.
    weights: the weight of each principal by name; None takes the row's own weights, or those of the configuration.
    """

    rule: RuleName
    agent_temperature: float
    weights: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads back, as stored in a run's plan."""
        weights = None if self.weights is None else dict(self.weights)
        return {"rule": str(self.rule), "agent_temperature": self.agent_temperature, "weights": weights}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Variant:
        return cls(RuleName(tree["rule"]), tree["agent_temperature"], tree["weights"])


def lay_out(config: Config) -> tuple[Variant, ...]:
    """Return every variant once, in the order rule, agent temperature, weights.

    Neither temperature nor weights change the answers of a rule that does not use principals (`base`), so it has
    one variant, with the first of each.
    """
    rules = config.grid.rules or (config.decoding.rule,)
    temperatures = config.grid.agent_temperatures or (config.decoding.agent_temperature,)
    vectors = tuple(_weight_vectors(config))
    variants: list[Variant] = []
    for rule in dict.fromkeys(rules):
        num_used = None if rule.uses_principals else 1
        for temperature in dict.fromkeys(temperatures[:num_used]):
            for vector in vectors[:num_used]:
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
    """Yield all ways to write `total` as an ordered sum of `num_parts` integers >= 0, the first part decreasing."""
    if num_parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, num_parts - 1):
            yield (first, *rest)
