"""The training data made from a run, read from RUN/_dataset/manifest.json; values of other types are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.inputs.given import as_number
from pipeline.reporting.stored import read_object
from pipeline.reporting.text import visible
from pipeline.storage.run import Run

MANIFEST = "_dataset/manifest.json"
KINDS = ("sft", "preferences")
ENDS = ("10 %", "90 %")


def describe_dataset(run: Run) -> dict[str, Any] | None:
    """Counts by kind and split, reasons for dropping answers, and charts; None without a data set.

    Raises:
        StorageError: the manifest is not a JSON object.
    """
    tree = read_object(run, MANIFEST, remedy="make the data set again")
    if tree is None:
        return None
    histograms = _mapping(tree.get("histograms"))
    charts = {f"dataset.{name}": _chart(name, _mapping(each)) for name, each in histograms.items()}
    return {
        "answers": _count(tree.get("answers")),
        "prompts": _counts(tree.get("prompts")),
        "kinds": [_kind(name, tree[name]) for name in KINDS if isinstance(tree.get(name), dict)],
        "charts": {name: chart for name, chart in charts.items() if chart is not None},
    }


def _kind(name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    dropped = _counts(tree.get("answers_dropped"))
    used = _count(tree.get("answers_used"))
    total = (used or 0) + sum(count for _, count in dropped)
    return {
        "name": name,
        "rows": _counts(tree.get("rows")),
        "used": used,
        "used_share": (used or 0) / total if total else 0.0,
        "dropped": [(reason, count, count / total) for reason, count in sorted(dropped, key=lambda item: -item[1])],
    }


def _chart(name: str, tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """A stored histogram as a ridge chart draws it; the edges of its bins are equally spaced."""
    edges, counts, quantiles = ([as_number(x) for x in _list(tree.get(k))] for k in ("edges", "counts", "quantiles"))
    if None in (*edges, *counts, *quantiles) or len(edges) != len(counts) + 1 < 2 or len(quantiles) != 5:
        return None
    low, high = (edges[0] or 0.0), (edges[-1] or 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    kind, _, quantity = name.partition(".")
    group = {
        "rule": kind,
        "n": int(sum(count or 0.0 for count in counts)),
        "counts": counts,
        "low": quantiles[1],
        "median": quantiles[2],
        "high": quantiles[3],
        "mean": None,
        "values": [],
    }
    return {
        "label": f"{visible(kind)}: {visible(quantity).replace('_', ' ').replace('.', ' ')}",
        "unit": "",
        "log": False,
        "low": low,
        "high": high,
        "outside": 0,
        "ends": ENDS,
        "groups": [group],
    }


def _counts(tree: Any) -> list[tuple[str, int]]:
    return [(visible(name), count) for name, each in _mapping(tree).items() if (count := _count(each)) is not None]


def _count(value: Any) -> int | None:
    number = as_number(value)
    return None if number is None else int(number)


def _mapping(tree: Any) -> Mapping[str, Any]:
    return tree if isinstance(tree, dict) else {}


def _list(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) else []
