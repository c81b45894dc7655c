"""The scores of a run's answers, in files of their own: one file per shard, written once.

RUN/_scores/part-00000-of-00004.parquet holds row_id, variant, sample and one column per judge. Its footer names the
panel by its digest and the answers by their hash. So a file of other judges or other answers is recognised and
replaced, and nothing is decoded again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CageError
from pipeline.evaluation.answers import ANSWER_COLUMNS, REASONING_TOKENS, as_numbers
from pipeline.evaluation.judges.interface import Judge, JudgedAnswer, NoScore, why_missing
from pipeline.evaluation.panel import Panel
from pipeline.storage.commits import CommitRecord
from pipeline.storage.run import Run
from pipeline.storage.shard_files import as_damaged_file
from pipeline.storage.tables import write_table_bytes

SCORES = "_scores/"
JUDGES_KEY, ANSWERS_KEY, FINAL_KEY = "cage.judges", "cage.answers", "cage.final"
ERRORS = "_errors"  # by judge, why it gave no score; only in files where one gave none
JUDGED_COLUMNS = ("row_id", "variant", "sample", "prompt", "response", "num_tokens", "rewards")


@dataclass(frozen=True, slots=True)
class ScoreFiles:
    """The score files of one panel in one run. Picklable.

    Args:
        run: the run whose answers are scored.
        panel: the judges.
    """

    run: Run
    panel: Panel

    def pending(self) -> list[CommitRecord]:
        """The committed shards without scores of this panel, in order."""
        found = set(self.run.store.names(SCORES))
        return [
            record
            for record in self.run.committed().values()
            if self._name(record) not in found or not self._is_of(record, is_final=True)
        ]

    def score(self, record: CommitRecord, judges: Mapping[str, Judge]) -> None:
        """Judge one shard's answers and write its file; a second call changes nothing.

        Args:
            record: the committed shard.
            judges: what `panel.load()` returned.
        """
        answers = self._read(_part_of(record), (*JUDGED_COLUMNS, *self._not_read))
        metadata = {JUDGES_KEY: self.panel.digest, ANSWERS_KEY: record.sha256_by_file[_part_of(record)]}
        table, is_final = judge_table(answers, judges)
        metadata[FINAL_KEY] = "yes" if is_final else "no"
        data = write_table_bytes(table, metadata=metadata)
        name = self._name(record)
        # two processes may score the same shard: the first file stays unless other judges or answers made it, or it
        # lacks scores that may be had by now
        if not self.run.store.create(name, data) and not self._is_of(record, is_final=True):
            self.run.store.put(name, data)

    def tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield each shard's answers, as numbers (`answers.as_numbers`), and their scores, in the same order of rows.

        Raises:
            CageError: a file scores other answers.
        """
        for record in self.run.committed().values():
            answers = as_numbers(self._read(_part_of(record), (*ANSWER_COLUMNS, *self._not_read)))
            scores = self._read(self._name(record), None)
            if answers.select(["row_id", "sample"]) != scores.select(["row_id", "sample"]):
                raise CageError(f"{self.run.store.url(self._name(record))} scores other answers; remove it")
            yield answers, scores.drop_columns([ERRORS] if ERRORS in scores.column_names else [])

    def failures(self) -> dict[str, Counter[str]]:
        """By judge, how many answers it gave no score, by reason; judges that gave all are left out."""
        found: dict[str, Counter[str]] = {}
        for record in self.run.committed().values():
            for reasons in self._read(self._name(record), (ERRORS,)).to_pylist():
                for judge, reason in reasons.get(ERRORS) or ():
                    found.setdefault(judge, Counter())[reason] += 1
        return found

    @property
    def _not_read(self) -> tuple[str, ...]:
        """The column of tokens that judges do not read: those of the reasoning, where it is no part of the answer."""
        return () if self.run.plan.reasons_in_answers else (REASONING_TOKENS,)

    def _name(self, record: CommitRecord) -> str:
        return SCORES + _part_of(record)

    def _is_of(self, record: CommitRecord, *, is_final: bool) -> bool:
        """Whether this panel made the score file, from the shard's present answers; and no score is to come."""
        url = self.run.store.url(self._name(record))
        with as_damaged_file(url), self.run.store.open(self._name(record)) as handle:
            metadata = pq.read_schema(handle).metadata or {}
        expected = {JUDGES_KEY: self.panel.digest, ANSWERS_KEY: record.sha256_by_file[_part_of(record)]}
        if is_final and metadata.get(FINAL_KEY.encode()) == b"no":
            return False
        return all(metadata.get(key.encode(), b"").decode() == value for key, value in expected.items())

    def _read(self, name: str, columns: tuple[str, ...] | None) -> pa.Table:
        with (
            as_damaged_file(self.run.store.url(name)),
            self.run.store.open(name) as handle,
            pq.ParquetFile(handle) as file,
        ):
            wanted = None if columns is None else [each for each in columns if each in file.schema_arrow.names]
            return file.read(columns=wanted)


def judge_table(answers: pa.Table, judges: Mapping[str, Judge]) -> tuple[pa.Table, bool]:
    """A table of scores, one row per answer and one column per judge; null where a judge gave none.

    The column `_errors` says why, by judge. Also whether asking again would give the same.
    """
    rows = [
        JudgedAnswer(
            row["prompt"],
            row["response"],
            row["num_tokens"] - (row.get(REASONING_TOKENS) or 0),
            row.get("rewards") or {},
        )
        for row in answers.to_pylist()
    ]
    variants = answers["variant"] if "variant" in answers.column_names else pa.array([0] * len(rows), pa.int32())
    columns = {"row_id": answers["row_id"], "variant": variants, "sample": answers["sample"]}
    reasons: list[dict[str, str]] = [{} for _ in rows]
    is_final = True
    for name, judge in judges.items():
        scores = judge.score(rows)
        columns[name] = pa.array([score if math.isfinite(score) else None for score in scores], pa.float64())
        for row, score in zip(reasons, scores, strict=True):
            if not math.isfinite(score):
                row[name] = why_missing(score)
                is_final = is_final and (score.is_final if isinstance(score, NoScore) else True)
    if any(reasons):
        columns[ERRORS] = pa.array([list(row.items()) for row in reasons], pa.map_(pa.string(), pa.string()))
    return pa.table(columns), is_final


def _part_of(record: CommitRecord) -> str:
    [name] = [name for name in record.sha256_by_file if name.startswith("part-")]
    return name
