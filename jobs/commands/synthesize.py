"""`cage synthesize`: make training data and describe it."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

from jobs.commands.status import status_fields
from jobs.commands.text import printable, shown_path, table
from jobs.logs import command_log, show_result
from pipeline.config.files import dump_config, load_as
from pipeline.hub.embedded import default_cache_folder
from pipeline.synthesis.dataset import Dataset
from pipeline.synthesis.settings import SynthesizeConfig
from pipeline.synthesis.statistics import SPLITS


def run_synthesize(
    config_file: Path,
    overrides: list[str],
    *,
    print_config: bool = False,
    is_new_run: bool = False,
    may_extend: bool = False,
    export_to: Path | None = None,
    is_verbose: bool = False,
) -> None:
    """Read the configuration, run the job, say what was written and how to load it."""
    config = load_as(SynthesizeConfig, config_file, overrides)
    if print_config:
        sys.stdout.write(dump_config(config))
        return
    from pipeline.stages.synthesize import synthesize
    from pipeline.synthesis.export import check_folder, export

    if export_to is not None:
        check_folder(export_to)
    with command_log() as out:
        dataset, was_decoded = synthesize(
            config,
            default_cache_folder(os.environ),
            out,
            is_verbose=is_verbose,
            may_begin_beside=is_new_run,
            may_extend=may_extend,
        )
    lines = [] if was_decoded or dataset.was_made else ["nothing to do: the data set is complete"]
    lines.append(describe_dataset(dataset))
    if export_to is not None:
        was_there = "" if export(dataset, export_to) else " (was there)"
        lines.append(f"  export    {printable(str(export_to))}{was_there}: datasets.load_from_disk")
    show_result(
        lambda: "\n".join(lines),
        was_run=was_decoded or dataset.was_made,
        **status_fields(dataset.run),
        rows={kind: dataset.manifest[kind]["rows"] for kind in ("sft", "preferences") if kind in dataset.manifest},
    )


def describe_dataset(dataset: Dataset) -> str:
    """What was made, what was dropped and why, where the files are and how to read them."""
    manifest, store = dataset.manifest, dataset.run.store
    path = shown_path(store.path)
    kinds = [kind for kind in ("sft", "preferences") if kind in manifest]
    lines = [
        f"{path}/_dataset: complete",
        f"  answers   {manifest['answers']:,} looked at, to {sum(manifest['prompts'].values()):,} prompts; "
        f"{manifest['answers_failed_in_the_run']:,} failed when they were decoded",
    ]
    for kind in kinds:
        rows = manifest[kind]["rows"]
        counts = ", ".join(f"{rows[split]:,} {split}" for split in SPLITS)
        lines.append(f"  {kind:<11} {counts} rows, of {manifest[kind]['answers_used']:,} answers")
    reasons = list(dict.fromkeys(reason for kind in kinds for reason in manifest[kind]["answers_dropped"]))
    if reasons:
        found = [
            [reason, *(_count(manifest[kind]["answers_dropped"].get(reason)) for kind in kinds)] for reason in reasons
        ]
        lines.append(textwrap.indent(table(["answers dropped by", *kinds], found), "  "))
    lines.append(f"  look      {path}/_dataset/README.md")
    lines += [
        f"  load      datasets.{_loading(path, kind)}" for kind in kinds if any(manifest[kind]["rows"].values())
    ]
    return "\n".join(lines)


def _loading(path: str, kind: str) -> str:
    """How `datasets` reads one kind: a folder by its card, an object store file by file."""
    if "://" in path:
        return f'load_dataset("parquet", data_files="{path}/_dataset/{kind}/train-*.parquet")'
    return f'load_dataset("{path}/_dataset", "{kind}")'


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
