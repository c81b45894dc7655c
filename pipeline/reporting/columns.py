"""Read the numbers of a run in batches, so that memory does not grow with the run.

N rows of a batch, Q quantities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.variants import names_of
from pipeline.records import FinishReason
from pipeline.reporting.scores import ScoreFile
from pipeline.storage.run import Run
from pipeline.storage.shard_files import as_damaged_file

ROWS_PER_BATCH = 32_768
PLAIN = (
    "num_tokens",
    "num_reasoning_tokens",
    "kl_per_token",
    "covered_mass",
    "max_residual",
    "num_unsolved",
    "solver_steps",
    "agent_temperature",
)
# of the messages of a pair only the role: it says whether there is one, and is short
PAIR = "chosen.list.element.role"
UNANSWERED = "unanswered"  # 1 where an answer ended within its reasoning
BY_PRINCIPAL = ("weights", "rewards", "payments", "original_rewards")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of one data file. Missing numbers are NaN.

    Args:
        file: the data file.
        start: the index of the first row in it.
        row_ids, samples, rules: of each row; a rule with its unit where a run has several (`names_of`).
        hashes: one per row; to order rows by them is to order them at random, in the same way every time.
        numbers: vectors [N] by name: the plain columns; "rewards.NAME", "weights.NAME" and so on by principal;
            "scores.NAME" by judge; 0 or 1 in "is_cut" (the answer ended at its limit), "has_pair" (it is one of
            a pair with an existing answer) and, where the base reasons, "unanswered".
    """

    file: str
    start: int
    row_ids: Sequence[str]
    samples: Sequence[int]
    rules: Sequence[str]
    hashes: np.ndarray[Any, np.dtype[np.uint64]]
    numbers: dict[str, np.ndarray[Any, np.dtype[np.float64]]]

    def __len__(self) -> int:
        return len(self.row_ids)


def data_files(run: Run) -> list[str]:
    """The committed data files, in order."""
    return [name for record in run.committed().values() for name in record.sha256_by_file if name.startswith("part-")]


def read_batches(run: Run, file: str, *, judges: Sequence[str] = ()) -> Iterator[Batch]:
    """Yield a data file's numbers.

    Args:
        run: the run.
        file: the data file.
        judges: columns of the score file to read along.
    """
    scores = ScoreFile.beside(run, file, judges)
    methods = names_of(run.plan.variants)
    with as_damaged_file(run.store.url(file)), run.store.open(file) as handle, pq.ParquetFile(handle) as parquet:
        present = parquet.schema_arrow.names
        wanted = [
            name
            for name in ("row_id", "sample", "variant", "finish_reason", *PLAIN, *BY_PRINCIPAL)
            if name in present
        ]
        wanted += [PAIR] if "chosen" in present else []
        start = 0
        for piece in parquet.iter_batches(batch_size=ROWS_PER_BATCH, columns=wanted):
            yield _batch(piece, file, start, methods, scores)
            start += piece.num_rows


def _batch(piece: pa.RecordBatch, file: str, start: int, methods: Sequence[str], scores: ScoreFile) -> Batch:
    columns = dict(zip(piece.schema.names, piece.columns, strict=True))
    row_ids = columns["row_id"].to_pylist()
    numbers = {name: _floats(columns[name]) for name in PLAIN if name in columns}
    if "num_reasoning_tokens" in columns:
        numbers[UNANSWERED] = _floats(pc.equal(columns["finish_reason"], str(FinishReason.REASONING)))
    for name in BY_PRINCIPAL:
        for field in columns[name].type if name in columns else ():
            numbers[f"{name}.{field.name}"] = _floats(pc.struct_field(columns[name], field.name))
    numbers["is_cut"] = _floats(pc.equal(columns["finish_reason"], str(FinishReason.LENGTH)))
    if "chosen" in columns:
        numbers["has_pair"] = _floats(columns["chosen"].is_valid())
    samples = columns["sample"].to_pylist()
    variants = columns["variant"].to_pylist() if "variant" in columns else [0] * len(row_ids)
    rules = [methods[variant] for variant in variants]
    keys = list(zip(row_ids, variants, samples, strict=True))
    numbers.update(scores.take(keys))
    return Batch(file, start, row_ids, samples, rules, _hashes(keys), numbers)


def _floats(column: pa.Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _hashes(keys: Sequence[tuple[str, int, int]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    digest = b"".join(
        hashlib.blake2b(f"{row_id}\0{variant}\0{sample}".encode(), digest_size=8).digest()
        for row_id, variant, sample in keys
    )
    return np.frombuffer(digest, dtype=">u8").astype(np.uint64)
