"""`cage compare`: runs and answers from elsewhere, judged by the same judges."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.commands.exports import as_csv, as_json, as_jsonl, as_latex, check_outputs, write_outputs
from jobs.commands.text import indented, number, printable, table
from pipeline.config.files import parse_as, read_yaml
from pipeline.errors import ConfigurationError
from pipeline.evaluation.compare import compare, score_systems, scored_answers
from pipeline.evaluation.config import BootstrapConfig
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.panel import resolve_panel
from pipeline.evaluation.reading import decimals
from pipeline.evaluation.systems import read_systems
from pipeline.hub.embedded import default_cache_folder
from pipeline.sections import Section

DEFAULT_JUDGES = {"words": "length", "sentiment": "sentiment", "repetition": "repetition"}  # kinds by name


class CompareConfig(Section):
    """The judges of a comparison."""

    judges: dict[str, AnyJudge]
    bootstrap: BootstrapConfig = BootstrapConfig()


def run_compare(paths: Sequence[str], *, config_file: Path | None, outputs: Sequence[Path]) -> None:
    """Judge every system's answers, print how they compare with the first one, and write the files asked for."""
    check_outputs(outputs, (*WRITERS, SCORES))
    config = parse_as(CompareConfig, _tree(config_file), source=str(config_file or "judges"))
    systems = read_systems(paths)
    panel = resolve_panel(config.judges, default_cache_folder(os.environ), progress=print)
    readers = [name for name, judge in config.judges.items() if judge.reads_prompts]
    scored = score_systems(systems, panel.load(), prompt_readers=readers)
    found = compare(scored, config.bootstrap)
    print(describe(found))
    write_outputs(outputs, {**WRITERS, SCORES: lambda _: as_jsonl(scored_answers(systems, scored))}, found)


def describe(found: dict[str, Any]) -> str:
    """A table of means, one of differences, and what they are."""
    confidence = f"{found['bootstrap']['confidence']:.0%}"
    judges = list(found["systems"][0]["scores"])
    digits = {judge: decimals(*(each["scores"][judge]["mean"] for each in found["systems"])) for judge in judges}
    head = ["system", *judges, "KL per token", "cut"]
    means = [
        [
            printable(entry["system"]),
            *(number(entry["scores"][judge]["mean"], digits[judge]) for judge in judges),
            number(entry["kl_per_token"]),
            "-" if entry["share_cut"] is None else f"{entry['share_cut']:.0%}",
        ]
        for entry in found["systems"]
    ]
    lines = [f"{found['num_prompts']:,} prompts that all systems answered", "", table(head, means), ""]
    lines += [f"minus {printable(found['baseline'])}:", table(*_differences(found))]
    if left_out := found["num_prompts_left_out"]:
        lines.append(indented(f"{left_out:,} prompts are left out, because some system did not answer them."))
    if repeated := found["num_prompts_repeated"]:
        lines.append(
            indented(
                f"{repeated:,} prompts are equal to another one with another id. Intervals and p values take each "
                "for a prompt of its own, and are too small: give answers to one prompt one id and a field sample."
            )
        )
    lines += [indented(printable(note)) for note in found["notes"]]
    for judge, reasons in found["answers_without_a_score"].items():
        shown = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
        compared = found["num_prompts_by_judge"][judge]
        lines.append(
            indented(
                f"{judge} gave no score for {sum(reasons.values()):,} answers: {shown}. Its numbers are of the "
                f"{compared:,} prompts with a score of every system."
            )
        )
    lines.append(
        indented(
            f"Intervals ({confidence}) resample prompts and each prompt's samples; differences are paired by prompt. "
            "p is two-sided, no smaller than 2^(1 - prompts), and adjusted for all differences (Holm). needs: "
            "prompts with which this difference by itself would be found at 5 % with a chance of 80 %. cut: answers "
            "that ended at their length limit or within their reasoning."
        )
    )
    return "\n".join(lines)


def _differences(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["system, judge", "difference", "interval", "p", "won", "tied", "lost", "needs"]
    rows = []
    for each in found["differences"]:
        digits = decimals(each["difference"], *(each["interval"] or ()))
        low_high = "-" if each["interval"] is None else " to ".join(f"{end:+.{digits}f}" for end in each["interval"])
        needs = each["prompts_for_this_difference"]
        rows.append(
            [
                f"{printable(each['system'])}, {each['judge']}",
                "-" if each["difference"] is None else f"{each['difference']:+.{digits}f}",
                low_high,
                number(each["p_adjusted"]),
                str(each["wins"]),
                str(each["ties"]),
                str(each["losses"]),
                "-" if needs is None else f"{needs:,}",
            ]
        )
    return head, rows


def _tree(config_file: Path | None) -> dict[str, Any]:
    """The judges of a file, which may also be the configuration of an evaluation; the default ones without a file."""
    if config_file is None:
        return {"judges": {name: {"kind": kind} for name, kind in DEFAULT_JUDGES.items()}}
    tree = read_yaml(config_file)
    if isinstance(tree, dict) and isinstance(tree.get("evaluation"), dict):
        tree = {key: value for key, value in tree["evaluation"].items() if key in ("judges", "bootstrap")}
    if not isinstance(tree, dict) or not tree.get("judges"):
        raise ConfigurationError(f"{config_file} must have judges: {{name: {{kind: ...}}}}")
    return tree


def _as_csv(found: dict[str, Any]) -> str:
    """A line per system and judge: its mean, and its difference from the first system."""
    by_key = {(each["system"], each["judge"]): each for each in found["differences"]}
    fields = ["difference", "difference_low", "difference_high", "p", "p_adjusted", "wins", "ties", "losses"]
    head = ["system", "judge", "mean", "low", "high", *fields, "kl_per_token", "share_cut"]
    rows = []
    for entry in found["systems"]:
        for judge, score in entry["scores"].items():
            other = by_key.get((entry["system"], judge), {})
            ends = zip(("low", "high"), score["interval"] or (), strict=False)
            of_difference = zip(("difference_low", "difference_high"), other.get("interval") or (), strict=False)
            rows.append(
                {**entry, **other, **dict(ends), **dict(of_difference), "judge": judge, "mean": score["mean"]}
            )
    return as_csv(head, rows)


def _as_latex(found: dict[str, Any]) -> str:
    """A table for booktabs: a row per system, a column per judge, with intervals."""
    judges = list(found["systems"][0]["scores"])
    rows = []
    for entry in found["systems"]:
        cells = [entry["system"]]
        for judge in judges:
            score = entry["scores"][judge]
            low_high = " to ".join(map(number, score["interval"] or ()))
            cells.append(number(score["mean"]) + (f" ({low_high})" if low_high else ""))
        rows.append([*cells, number(entry["kl_per_token"])])
    return as_latex(["system", *judges, "KL per token"], rows)


SCORES = ".jsonl"  # every answer with its scores
WRITERS = {".json": as_json, ".csv": _as_csv, ".tex": _as_latex}
