"""Whole rows for the report, read from the data files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from pipeline.records import FinishReason
from pipeline.reporting.scores import ScoreFile
from pipeline.reporting.tally import Place
from pipeline.reporting.text import clipped, visible
from pipeline.reporting.tokens import describe_token
from pipeline.storage.names import is_of_failed_rows
from pipeline.storage.run import Run
from pipeline.storage.shard_files import as_damaged_file

SHOWN_TOKENS = 400
PROMPT_LIMIT, ANSWER_LIMIT = 1_500, 4_000
SHOWN_FAILED = 8
ROWS_PER_READ = 256
Row = dict[str, Any]


def fetch_rows(run: Run, places: Iterable[Place], judges: Sequence[str] = ()) -> dict[tuple[str, int], Row]:
    """The stored rows at these places, by (file, index), with the scores of `judges` as an additional column.

    Each file is read once, a few rows at a time.
    """
    wanted: dict[str, set[int]] = defaultdict(set)
    for place in places:
        wanted[place.file].add(place.index)
    rows = {}
    for file in sorted(wanted):
        scores = ScoreFile.beside(run, file, judges)
        for index, row in _rows_of(run, file, wanted[file]):
            found = scores.take([(row["row_id"], row.get("variant", 0), row["sample"])])
            row["scores"] = {name.removeprefix("scores."): float(values[0]) for name, values in found.items()}
            rows[file, index] = row
    return rows


def _rows_of(run: Run, file: str, indices: set[int]) -> Iterable[tuple[int, Row]]:
    with as_damaged_file(run.store.url(file)), run.store.open(file) as handle, pq.ParquetFile(handle) as parquet:
        start = 0
        for piece in parquet.iter_batches(batch_size=ROWS_PER_READ):
            for index in sorted(indices):
                if start <= index < start + piece.num_rows:
                    yield index, piece.slice(index - start, 1).to_pylist()[0]
            start += piece.num_rows
            if start > max(indices):
                return


def describe_example(row: Row, principal_names: Sequence[str], rule: str) -> dict[str, Any]:
    """What a card shows of a row: conversation, answer, numbers by principal, traced tokens.

    Args:
        row: as stored, with its scores.
        principal_names: of the run.
        rule: of the row, with its unit where the run has several.
    """
    messages = row.get("prompt") or []
    rewards, payments, weights = (row.get(name) or {} for name in ("rewards", "payments", "weights"))
    originals = row.get("original_rewards") or {}
    return {
        "row_id": visible(row["row_id"]),
        "sample": row["sample"],
        "rule": rule,
        "agent_temperature": row.get("agent_temperature"),
        "messages": [_message(message) for message in messages],
        "answer": clipped(visible(row["response"] or ""), ANSWER_LIMIT),
        "reasoning": clipped(visible(row.get("reasoning") or ""), ANSWER_LIMIT),
        "ending": FinishReason(row["finish_reason"]).words,
        "num_tokens": row["num_tokens"],
        "kl_per_token": row.get("kl_per_token"),
        "original": _original(row),
        "scores": [(visible(name), score) for name, score in row.get("scores", {}).items()],
        "principals": [
            {
                "name": name,
                "weight": weights.get(name),
                "reward": rewards.get(name),
                "paid": payments.get(name),
                "original": originals.get(name),
            }
            for name in principal_names
        ],
        "has_thresholds": any(token.get("thresholds") for token in row.get("tokens") or []),
        "tokens": [describe_token(token, principal_names) for token in (row.get("tokens") or [])[:SHOWN_TOKENS]],
        "tokens_left": max(0, len(row.get("tokens") or []) - SHOWN_TOKENS),
    }


def fetch_failed(run: Run) -> list[dict[str, str]]:
    """The first few failed rows with their reasons."""
    found: list[dict[str, str]] = []
    for record in run.committed().values():
        for name in record.sha256_by_file:
            if is_of_failed_rows(name) and len(found) < SHOWN_FAILED:
                found += _failed_of(run, name, SHOWN_FAILED - len(found))
    return found


def _failed_of(run: Run, name: str, limit: int) -> list[dict[str, str]]:
    with as_damaged_file(run.store.url(name)), run.store.open(name) as handle, pq.ParquetFile(handle) as parquet:
        piece = next(parquet.iter_batches(batch_size=limit, columns=["row_id", "error"]), None)
        rows = [] if piece is None else piece.to_pylist()
    return [{"row_id": visible(row["row_id"]), "reason": clipped(visible(row["error"]), 500)} for row in rows]


def _message(message: Mapping[str, str]) -> dict[str, str]:
    return {"role": visible(message["role"]), "content": clipped(visible(message["content"]), PROMPT_LIMIT)}


def _original(row: Row) -> dict[str, Any] | None:
    if row.get("original_response") is None:
        return None
    chosen = (row.get("chosen") or [{}])[0].get("content")
    return {
        "text": clipped(visible(row["original_response"]), ANSWER_LIMIT),
        "is_chosen": chosen == row["original_response"] != row["response"],
    }
