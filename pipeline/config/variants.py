"""Variants: the combinations of rule, unit, temperatures and weights with which a run answers every prompt.

A run without a grid has one variant, which takes its weights from the row or from the principals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from cage.rule_names import RuleName
from pipeline.config.sections import Config, DecodingConfig, SimplexConfig
from pipeline.config.units import Unit
from pipeline.protocol.specs import SamplingOptions


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to answer a prompt.

    rule: how the base policy and the principals' values become one policy.
    agent_temperature: what moving away from the base policy costs, in the unit of the values.
    weights: the weight of each principal by name; None takes the row's own weights, or those of the configuration.
    unit: what a game is about.
    temperature: of the draw from the policy; None takes the configured one.
    """

    rule: RuleName
    agent_temperature: float
    weights: Mapping[str, float] | None = None
    unit: Unit = Unit.TOKEN
    temperature: float | None = None

    def draw(self, decoding: DecodingConfig) -> tuple[float, float]:
        """Temperature and top_p of the draw from its policy."""
        return decoding.temperature if self.temperature is None else self.temperature, decoding.top_p

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads back, as stored in a run's plan."""
        weights = None if self.weights is None else dict(self.weights)
        tree = {"rule": str(self.rule), "agent_temperature": self.agent_temperature, "weights": weights}
        return {**tree, "unit": str(self.unit), "temperature": self.temperature}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], *, unit: str = Unit.TOKEN) -> Variant:
        """Read a stored variant; `unit` is that of runs which stored none."""
        return cls(
            RuleName(tree["rule"]),
            tree["agent_temperature"],
            tree["weights"],
            Unit(tree.get("unit", unit)),
            tree.get("temperature"),
        )


def lay_out(config: Config) -> tuple[Variant, ...]:
    """Return every variant once, in the order rule, unit, temperature, agent temperature, weights.

    What does not change the answers of a rule has its first value alone: for `base`, units, agent temperatures and
    weights. A rule is left out over units that it is not for.
    """
    rules = config.grid.rules or (config.decoding.rule,)
    agent_temperatures = config.grid.agent_temperatures or (config.decoding.agent_temperature,)
    temperatures: tuple[float | None, ...] = config.grid.draw_temperatures or (None,)
    vectors = tuple(_weight_vectors(config))
    variants: list[Variant] = []
    for rule in dict.fromkeys(rules):
        num_vectors = None if rule.uses_principals else 1
        num_temperatures = None if rule.uses_temperature else 1
        # what takes the best proposal draws nothing from its policy
        num_draws = 1 if rule.uses_principals and not rule.uses_temperature else None
        for unit, temperature, agent_temperature, vector in product(
            _units(rule, config.units),
            temperatures[:num_draws],
            agent_temperatures[:num_temperatures],
            vectors[:num_vectors],
        ):
            variant = Variant(rule, agent_temperature, vector, unit, temperature)
            if variant not in variants:
                variants.append(variant)
    return tuple(variants)


def names_of(variants: Sequence[Variant]) -> tuple[str, ...]:
    """The name of the method of each variant: its rule, and what the run has several of for that rule.

    Variants that differ in agent temperature or weights alone have one method. Games over tokens are not named.
    """
    names = []
    for variant in variants:
        alike = [other for other in variants if other.rule is variant.rule]
        parts = []
        if len({other.unit for other in alike}) > 1 and variant.unit is not Unit.TOKEN:
            parts.append(str(variant.unit))
        if len({other.temperature for other in alike}) > 1:
            parts.append("greedy" if variant.temperature == 0 else f"temperature {variant.temperature:g}")
        names.append(f"{variant.rule} ({', '.join(parts)})" if parts else str(variant.rule))
    return tuple(names)


def sampling_of(decoding: DecodingConfig, variants: Sequence[Variant]) -> SamplingOptions:
    """How tokens are drawn: in games over tokens as configured; proposals from the policy as it is."""
    options = decoding.sampling
    if all(variant.unit is not Unit.TOKEN for variant in variants):
        return replace(options, temperature=1.0, top_p=1.0)
    return options


def draws_of(decoding: DecodingConfig, variants: Sequence[Variant]) -> frozenset[tuple[float, float]]:
    """Temperature and top_p of all draws of tokens in a run."""
    return frozenset(each.draw(decoding) if each.unit is Unit.TOKEN else (1.0, 1.0) for each in variants)


def _units(rule: RuleName, units: Sequence[Unit]) -> Sequence[Unit]:
    """The units that a rule is for; one of them where games change nothing."""
    if not rule.uses_principals:
        return [Unit.TOKEN] if Unit.TOKEN in units else units[:1]
    return [unit for unit in units if (rule.serves_tokens if unit is Unit.TOKEN else rule.serves_texts)]


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
