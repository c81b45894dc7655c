"""Build the report of a run: numbers, charts and examples in one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2

from pipeline.config.variants import names_of
from pipeline.reporting import text
from pipeline.reporting.columns import data_files, read_batches
from pipeline.reporting.comparison import describe_metrics, judge_labels
from pipeline.reporting.dataset import describe_dataset
from pipeline.reporting.distributions import HEALTH, describe_distribution, shown_quantities
from pipeline.reporting.examples import fetch_failed
from pipeline.reporting.existing import describe_leads
from pipeline.reporting.facts import (
    describe_endings,
    describe_facts,
    describe_health,
    describe_principals,
    describe_settings,
    has_row_weights,
)
from pipeline.reporting.metrics import Metrics, read_metrics
from pipeline.reporting.scores import find_judges
from pipeline.reporting.showcase import collect_examples
from pipeline.reporting.tally import SAMPLED_ROWS, Tally, rule_order, tally
from pipeline.storage.run import Run

REPORT = "_report.html"
STYLES = ("page.css", "tokens.css")
SCRIPTS = (
    "draw.js",
    "ridge.js",
    "scatter.js",
    "parallel.js",
    "differences.js",
    "comparison.js",
    "tokens.js",
    "page.js",
)


def write_report(run: Run) -> str:
    """Write RUN/_report.html and return its address."""
    run.store.put(REPORT, render_report(run))
    return run.store.url(REPORT)


def render_report(run: Run, *, sampled_rows: int = SAMPLED_ROWS) -> bytes:
    """The report as one HTML file; the same files give the same bytes.

    Args:
        run: the run, complete or not.
        sampled_rows: distributions are of at most so many rows.

    Raises:
        StorageError: a file of the run is damaged.
    """
    files = data_files(run)
    judges = find_judges(run, files)
    names = run.plan.principal_names
    batches = (batch for file in files for batch in read_batches(run, file, judges=judges))
    numbers = tally(batches, names, sampled_rows=sampled_rows)
    metrics, dataset = read_metrics(run), describe_dataset(run)
    comparison = describe_metrics(metrics, names) if metrics else None
    labels = {name: (judge_labels(metrics) if metrics else {}).get(name, name) for name in judges}
    quantities = [*shown_quantities(names, labels, has_row_weights=has_row_weights(run)), *HEALTH]
    drawn = {quantity.column: describe_distribution(numbers, quantity) for quantity in quantities}
    charts = {name: chart for name, chart in drawn.items() if chart is not None}
    health = [quantity.column for quantity in HEALTH if quantity.column in charts]
    data = {
        "rules": _rules(numbers, metrics) or list(names_of(run.plan.variants)),
        "principals": names,
        "charts": {**charts, **(dataset["charts"] if dataset else {})},
        "comparison": comparison and comparison["data"],
    }
    return _render(
        facts=describe_facts(run, numbers),
        principals=describe_principals(run, numbers),
        endings=describe_endings(numbers),
        leads=describe_leads(numbers.leads, names, list(numbers.by_rule)),
        comparison=comparison,
        dataset=dataset,
        distributions=[name for name in charts if name not in health],
        charts=charts,
        sampled=len(numbers.sample.hashes),
        rows=numbers.rows,
        prompts=run.plan.num_rows,
        health=describe_health(numbers, names),
        health_charts=health,
        **collect_examples(run, numbers, judges),
        failed=fetch_failed(run),
        reasons=list(run.status().errors.items()),
        settings=describe_settings(run),
        data=text.embeddable(data),
    ).encode("utf-8")


def _rules(numbers: Tally, metrics: Metrics | None) -> list[str]:
    """All rules of the answers and of the comparison; their order decides their colours."""
    compared = [point.rule for point in metrics.points] if metrics else []
    return sorted(dict.fromkeys([*numbers.by_rule, *compared]), key=rule_order)


def _render(**parts: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"visible": text.visible, "number": text.number, "scientific": text.scientific, "plain": text.plain}
    environment.filters.update(filters)
    style = "".join(_asset(name) for name in STYLES)
    script = '"use strict";(() => {\n' + "".join(_asset(name) for name in SCRIPTS) + "})();\n"
    template = environment.get_template("report.html.jinja")
    return template.render(
        style=style, script=script, style_hash=_csp_hash(style), script_hash=_csp_hash(script), **parts
    )


def _asset(name: str) -> str:
    return resources.files("pipeline.reporting").joinpath("assets", name).read_text(encoding="utf-8")


def _csp_hash(content: str) -> str:
    """The name of an inline element in the content security policy, which blocks every other script and style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
