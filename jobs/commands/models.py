"""`cage models`: the model families and how they are served."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jobs.commands.text import table
from pipeline.errors import ConfigurationError
from pipeline.hub.families import (
    PLAIN,
    REFUSED,
    SLOTS,
    FamilyTable,
    ServedFamily,
    read_table,
    write_table,
)

WORDS = {SLOTS: "in slots", PLAIN: "row by row", REFUSED: "refused"}
HEAD = (
    "family",
    "decoding",
    "strict",
    "LoRA",
    "CUDA graphs",
    "reward model",
    "tensor parallel",
    "pipeline parallel",
    "reason",
)


def run_models(names: Sequence[str], *, measure: bool, write: bool, markdown: bool, json_file: Path | None) -> None:
    if measure or write:
        from jobs.families.measure import measure_families  # loads models: takes minutes

        found = measure_families(names)
        if write:
            kept = {} if not names else read_table().families
            write_table(FamilyTable(found.transformers, {**kept, **found.families}))
    else:
        found = _chosen(read_table(), names)
    if json_file is not None:
        families = {name: asdict(family) for name, family in found.families.items()}
        json_file.write_text(json.dumps({"transformers": found.transformers, "families": families}, indent=1) + "\n")
    print(markdown_table(found) if markdown else text_table(found))


def text_table(found: FamilyTable) -> str:
    """The table for a terminal, with a line that sums it up."""
    rows = [_row(name, family) for name, family in found.families.items()]
    return f"{table(HEAD[:-1], [row[:-1] for row in rows])}\n\n{_reasons(found.families)}{summary(found)}"


def summary(found: FamilyTable) -> str:
    """How many families are served, and how."""
    numbers = {way: sum(family.decoding == way for family in found.families.values()) for way in WORDS}
    parts = ", ".join(f"{number} {WORDS[way]}" for way, number in numbers.items())
    total = len(found.families)
    return f"{total} famil{'y' if total == 1 else 'ies'} of transformers {found.transformers}: {parts}"


def markdown_table(found: FamilyTable) -> str:
    """The table as docs/models.md has it."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for name, family in found.families.items():
        cells = [cell.replace("|", "\\|").replace("<", "&lt;") for cell in _row(name, family)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(name: str, family: ServedFamily) -> list[str]:
    if family.decoding == REFUSED:
        return [name, WORDS[REFUSED], "", "", "", "", "", "", family.reasons["decoding"]]
    said = (
        family.is_strict,
        family.takes_adapters,
        family.has_fixed_passes,
        family.is_reward_model,
        family.is_tensor_parallel,
        family.is_pipeline_parallel,
    )
    labels = {
        "decoding": "",
        "lora": "LoRA: ",
        "reward_model": "reward model: ",
        "tensor_parallel": "ranks: ",
        "pipeline_parallel": "devices: ",
    }
    reasons = [f"{label}{family.reasons[key]}" for key, label in labels.items() if key in family.reasons]
    return [name, WORDS[family.decoding], *("yes" if each else "no" for each in said), "; ".join(reasons)]


def _reasons(families: Mapping[str, ServedFamily]) -> str:
    """The reasons of a few families, in full; of many they would hide the table."""
    if len(families) > 10:
        return ""
    lines = [
        f"{name}, {what.replace('_', ' ')}: {reason}"
        for name, family in families.items()
        for what, reason in family.reasons.items()
    ]
    return "".join(f"{line}\n" for line in lines) + ("\n" if lines else "")


def _chosen(found: FamilyTable, names: Sequence[str]) -> FamilyTable:
    for name in names:
        if name not in found.families:
            close = difflib.get_close_matches(name, found.families, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigurationError(f"{name} is no model family of transformers {found.transformers}{hint}")
    return FamilyTable(found.transformers, {name: found.families[name] for name in names} or found.families)
