"""The data set card: what the data set holds, where it comes from and how it was made. `datasets` reads its head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from pipeline.config.variants import names_of
from pipeline.storage.card import escape_markdown
from pipeline.storage.plan import Plan
from pipeline.synthesis.settings import DataKind
from pipeline.synthesis.statistics import SPLITS, DatasetStatistics, Histogram
from pipeline.synthesis.tables import COLUMN_NOTES

UNKNOWN = "unknown"
BARS = "▁▂▃▄▅▆▇█"
SHOWN = 100
TITLES = {
    DataKind.SFT: "conversations for supervised fine-tuning",
    DataKind.PREFERENCES: "preference pairs, for DPO and its kin",
}


def render_card(
    plan: Plan, statistics: DatasetStatistics, manifest: Mapping[str, Any], *, judge_models: Mapping[str, str]
) -> bytes:
    """README.md of the data set. Text from prompts, models and settings is escaped."""
    files = [file["name"] for file in manifest["files"]]
    kinds = [kind for kind in statistics.settings.write if statistics.num_rows(kind)]
    sections = [
        f"---\n{yaml.safe_dump(_front(kinds, files), sort_keys=False)}---\n",
        "# Training data aligned at decoding time",
        "Answers of a language model that several objectives steered while it wrote: at every token their payments "
        "reached an equilibrium (or followed a simpler rule, see below), and what is good enough was kept.",
        "## What is in it\n\n" + _contents(statistics) + "\n\n" + _split_note(statistics),
        "## How to load it\n\n" + _loading(kinds),
        "## Where it comes from\n\n" + _provenance(plan, judge_models),
        "## Licences\n\n" + _licences(plan, statistics.settings.licences),
        "## What was dropped\n\n" + _dropped(statistics, manifest["answers_failed_in_the_run"]),
        "## Scores\n\n" + _scores(statistics.histograms()),
        "## Columns\n\n" + markdown_table(("column", "what"), COLUMN_NOTES.items()),
        "## Settings\n\n" + markdown_table(("setting", "value"), _settings(plan, statistics)),
        f"The run's fingerprint is `{plan.digest}`, the data set's `{manifest['digest']}`; every file's SHA-256 is "
        "in `manifest.json`.",
    ]
    return ("\n\n".join(sections) + "\n").encode("utf-8", errors="backslashreplace")


def markdown_table(head: Sequence[str], rows: Any) -> str:
    """A table whose cells are escaped."""
    lines = [head, ["---"] * len(head), *([escape_markdown(str(cell)) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _front(kinds: Sequence[DataKind], files: Sequence[str]) -> dict[str, Any]:
    """The YAML head for `datasets` and the hub: which files are which split of which configuration."""
    stems = {name.rpartition("-of-")[0].rpartition("-")[0] for name in files}
    configs = [
        {
            "config_name": str(kind),
            "data_files": [
                {"split": split, "path": f"{kind}/{split}-*.parquet"}
                for split in SPLITS
                if f"{kind}/{split}" in stems
            ],
        }
        for kind in kinds
    ]
    return {"configs": configs, "tags": ["alignment", "common-agency", "synthetic", "trl"]}


def _contents(statistics: DatasetStatistics) -> str:
    rows = [
        (str(kind), TITLES[kind], *(f"{statistics.rows[kind, split]:,}" for split in SPLITS))
        for kind in statistics.settings.write
    ]
    return markdown_table(("configuration", "what", *SPLITS), rows)


def _split_note(statistics: DatasetStatistics) -> str:
    counts = " and ".join(f"{statistics.num_prompts[split]:,} for {split}" for split in SPLITS)
    return (
        f"Split by prompt: a hash of the prompt's text decides, so that no prompt is in both splits ({counts}). "
        "A pair is made of two answers to one prompt under the same weights; never across weights, since what is "
        "preferred depends on them."
    )


def _loading(kinds: Sequence[DataKind]) -> str:
    lines = [f'{kind} = load_dataset("path/to/this/folder", "{kind}")' for kind in kinds]
    return "```python\nfrom datasets import load_dataset\n\n" + "\n".join(lines) + "\n```"


def _provenance(plan: Plan, judge_models: Mapping[str, str]) -> str:
    models = [*plan.models.items(), *((f"synthesis.judges.{name}", model) for name, model in judge_models.items())]
    variants = [
        (method, f"{variant.agent_temperature:g}", _weights(variant.weights, plan))
        for method, variant in zip(names_of(plan.variants), plan.variants, strict=True)
    ]
    principals = [(name, section["kind"], _asked(section)) for name, section in plan.config["principals"].items()]
    parts = [
        markdown_table(("model", "identity"), models),
        markdown_table(("principal", "kind", "asks for"), principals),
        markdown_table(("rule", "agent temperature", "weights"), variants[:SHOWN]) + _more(len(variants)),
        markdown_table(("input", "rows"), [(file.name, f"{file.num_rows:,}") for file in plan.files[:SHOWN]])
        + _more(len(plan.files)),
    ]
    return "\n\n".join(parts)


def _asked(section: Mapping[str, Any]) -> str:
    principle = section.get("principle")
    return f'"{principle}"' if principle is not None else "what its model was trained to prefer"


def _weights(weights: Mapping[str, float] | None, plan: Plan) -> str:
    if weights is None and plan.config["input"]["weights"] is not None:
        return "each row's own"
    if weights is None:
        weights = {name: section["weight"] for name, section in plan.config["principals"].items()}
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"


def _more(num_rows: int) -> str:
    return f"\n\nand {num_rows - SHOWN:,} more" if num_rows > SHOWN else ""


def _licences(plan: Plan, licences: Mapping[str, str]) -> str:
    """One line per input and model; a licence that was not stated is unknown."""
    names = [file.name for file in plan.files]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    things = [("input", shown), *plan.models.items()]
    rows = [(place, identity, licences.get(place, UNKNOWN)) for place, identity in things]
    note = "As stated by whoever made this data set, in `synthesis.licences`; nothing was looked up."
    return markdown_table(("of", "name or identity", "licence"), rows) + "\n\n" + note


def _dropped(statistics: DatasetStatistics, num_failed: int) -> str:
    parts = [
        f"{statistics.num_answers:,} answers were looked at. Of each kind of data every one of them is used or was "
        "dropped for one reason, the first that applied; each dropped answer is in `dropped-*.parquet`. "
        f"{num_failed:,} more failed when they were decoded."
    ]
    for kind in statistics.settings.write:
        counts = [("used", statistics.used[kind]), *statistics.dropped[kind].most_common()]
        rows = [(what, f"{count:,}") for what, count in counts]
        parts.append(markdown_table((str(kind), "answers"), rows))
    return "\n\n".join(parts)


def _scores(histograms: Mapping[str, Histogram]) -> str:
    head = ("quantity", "least", "10 %", "median", "90 %", "most", "histogram", "counts")
    rows = [
        (
            name.replace(".", ": ", 1),
            *(f"{value:.4g}" for value in histogram.quantiles),
            _bars(histogram.counts),
            " ".join(map(str, histogram.counts)),
        )
        for name, histogram in histograms.items()
    ]
    return markdown_table(head, rows) + "\n\nTen bins of equal width from least to most; rewards in nats."


def _bars(counts: Sequence[int]) -> str:
    most = max(counts)
    return "".join(BARS[(count * (len(BARS) - 1) + most - 1) // most] if count else "·" for count in counts)


def _settings(plan: Plan, statistics: DatasetStatistics) -> Iterator[tuple[str, str]]:
    """The settings of decoding and of the data set."""
    decoding = {name: value for name, value in plan.fingerprint.items() if name.startswith("decoding.")}
    for name, value in {**decoding, **statistics.settings.fields()}.items():
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
