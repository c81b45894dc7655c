"""Answers of a synthesis run beside the scores of several judges, as `cage train` reads scored answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.errors import CageError

COLUMNS = ("row_id", "sample", "prompt", "response", "finish_reason")
FINISHED = ("stop", "length")


def write_scored(run: Path, judges: Sequence[str], place: Path) -> None:
    """Write one line for every answer: `prompt`, `response`, and a column for each judge.

    Args:
        run: folder of a finished `cage synthesize` whose judges have scored all answers.
        judges: whose scores are wanted; an answer that one of them does not score is left out.
        place: JSON Lines file.

    Raises:
        CageError: no answer has all of these scores.
    """
    lines = [json.dumps(each) + "\n" for each in _scored(run, judges)]
    if not lines:
        raise CageError(f"{run}: no answer is scored by {', '.join(judges)}; run cage synthesize with these judges")
    aside = place.with_suffix(".aside")
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(place)


def _scored(run: Path, judges: Sequence[str]) -> Iterator[dict[str, Any]]:
    for part in sorted(run.glob("part-*.parquet")):
        scores = {
            (row["row_id"], row["sample"]): [row.get(judge) for judge in judges]
            for row in pq.read_table(run / "_scores" / part.name).to_pylist()
        }
        for row in pq.read_table(
            part, columns=["row_id", "sample", "prompt", "response", "finish_reason"]
        ).to_pylist():
            found = scores.get((row["row_id"], row["sample"]), [None])
            is_known = all(score is not None and score == score for score in found)
            if row["finish_reason"] in FINISHED and is_known:
                prompt, response = row["prompt"], row["response"]
                yield {"prompt": prompt, "response": response, **dict(zip(judges, found, strict=True))}
