"""Read _metrics.json of an evaluation. Every key is optional; a value of an unexpected type is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.inputs.given import as_number
from pipeline.reporting.stored import read_object
from pipeline.storage.run import Run

METRICS = "_metrics.json"
SHOWN_POINTS = 1_000
SHOWN_LINES = 500


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap interval, where there is one."""

    mean: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class VariantMetrics:
    """The metrics of one variant: a rule at one agent temperature and one weight vector.

    Args:
        rule, agent_temperature, weights: of the variant; weights by principal.
        num_rows: how many prompts the means are over.
        objectives: mean scores by objective.
        scores: mean scores by judge.
        kl_per_token, num_tokens: means.
        worst_principal: the lowest normalised objective.
        uses_temperature: whether it depends on the agent temperature; otherwise it stands for every one.
    """

    rule: str
    agent_temperature: float | None
    weights: Mapping[str, float]
    num_rows: int | None
    objectives: Mapping[str, Interval]
    scores: Mapping[str, Interval]
    kl_per_token: float | None
    num_tokens: float | None
    worst_principal: float | None
    uses_temperature: bool = True


@dataclass(frozen=True, slots=True)
class Metrics:
    """The parts of _metrics.json that the report shows.

    `points` has one entry per variant. Lists of mappings become tables with a column per key.
    """

    objectives: tuple[str, ...]
    judge_names: tuple[str, ...]
    reference_point: Mapping[str, float]
    points: tuple[VariantMetrics, ...]
    rules: Mapping[str, Mapping[str, Any]]
    control: tuple[Mapping[str, Any], ...]
    win_rates: tuple[Mapping[str, Any], ...]
    by_temperature: tuple[Mapping[str, Any], ...]
    equal_kl: tuple[Mapping[str, Any], ...]
    judges: Mapping[str, Any]
    bootstrap: Any
    differences: tuple[Mapping[str, Any], ...]
    normalised_from: Mapping[str, Any]
    published_reference_point: Mapping[str, float]
    reading: tuple[str, ...]
    notes: tuple[str, ...]


def read_metrics(run: Run) -> Metrics | None:
    """The metrics of an evaluation; None for a run without one.

    Raises:
        StorageError: the file is not a JSON object.
    """
    tree = read_object(run, METRICS, remedy="evaluate the run again")
    return None if tree is None else parse_metrics(tree)


def parse_metrics(tree: Mapping[str, Any]) -> Metrics:
    """The parts of the tree that have the expected types."""
    points = tuple(_point(each) for each in _mappings(tree.get("points"))[:SHOWN_POINTS])
    named = [str(name) for name in _list(tree.get("objectives"))]
    found = dict.fromkeys([*named, *(name for point in points for name in point.objectives)])
    return Metrics(
        objectives=tuple(found),
        judge_names=tuple(dict.fromkeys(name for point in points for name in point.scores)),
        reference_point=_numbers(tree.get("reference_point")),
        points=points,
        rules={str(rule): values for rule, values in _items(tree.get("rules")) if isinstance(values, dict)},
        control=_mappings(tree.get("control")),
        win_rates=_mappings(tree.get("win_rates")),
        by_temperature=_mappings(tree.get("by_temperature")),
        equal_kl=_mappings(tree.get("equal_kl")),
        judges=dict(_items(tree.get("judges"))),
        bootstrap=tree.get("bootstrap"),
        differences=_mappings(tree.get("differences")),
        normalised_from=dict(_items(tree.get("normalised_from"))),
        published_reference_point=_numbers(tree.get("published_reference_point")),
        reading=tuple(str(sentence) for sentence in _list(tree.get("reading"))),
        notes=tuple(str(note) for note in _list(tree.get("notes"))),
    )


def _point(tree: Mapping[str, Any]) -> VariantMetrics:
    count = as_number(tree.get("n"))
    return VariantMetrics(
        rule=str(tree.get("rule", "")),
        agent_temperature=as_number(tree.get("agent_temperature")),
        weights=_numbers(tree.get("weights")),
        num_rows=None if count is None else int(count),
        objectives=_intervals(tree.get("objectives"), tree.get("intervals")),
        scores=_intervals(tree.get("scores"), tree.get("score_intervals")),
        kl_per_token=as_number(tree.get("kl_per_token")),
        num_tokens=as_number(tree.get("num_tokens")),
        worst_principal=as_number(tree.get("worst_principal")),
        uses_temperature=tree.get("uses_temperature", tree.get("rule") != "base") is True,
    )


def as_interval(mean: Any, ends: Any) -> Interval:
    """A mean and the ends of its interval, each None if it is not a number."""
    low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return Interval(as_number(mean), as_number(low), as_number(high))


def _intervals(means: Any, intervals: Any) -> dict[str, Interval]:
    ends = dict(_items(intervals))
    return {name: as_interval(mean, ends.get(name)) for name, mean in _items(means)}


def _numbers(tree: Any) -> dict[str, float]:
    return {name: value for name, each in _items(tree) if (value := as_number(each)) is not None}


def _items(tree: Any) -> Iterable[tuple[str, Any]]:
    return tree.items() if isinstance(tree, dict) else ()


def _list(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else []


def _mappings(tree: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(each for each in _list(tree) if isinstance(each, dict))[:SHOWN_POINTS]
