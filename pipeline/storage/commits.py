"""The commit record of a shard: a shard exists exactly if its record exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import pyarrow as pa

from pipeline.errors import CageError, StorageError
from pipeline.monitoring.reasons import Example, Failures
from pipeline.monitoring.values import ValueRange
from pipeline.records import Record

# Fields that records of earlier versions do not have.
ABSENT_BEFORE: Mapping[str, Any] = {
    "recoveries": {},
    "examples": {},
    "values": {},
    "unsteered": 0,
    "failed_at": None,
    "revision": 0,
    "reruns": 0,
    "passes": 0,
    "accepted": 0,
}


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """What one committed shard holds, and how it was computed.

    What differs from attempt to attempt (`committed_at`, `attempt`, `seconds`, `host`, `recoveries`, `passes`,
    `accepted`) is stored here and nowhere else, so that the data files of every attempt are the same bytes.

    Args:
        shard: the shard's index in the plan.
        rows: the number of aligned records, one per row, variant and sample.
        failed: the number of records with an error.
        tokens: the number of tokens of the aligned records.
        sha256_by_file: the files that belong to the run; what else lies in the folder does not.
        num_bytes: the size of these files together.
        digest: of the plan that the shard was computed for.
        committed_at: Unix time.
        pyarrow: the version that wrote the files; another one may write other bytes for the same rows.
        attempt: 1 for the first.
        seconds: how long the attempt took.
        host: where it ran.
        errors: how often each kind of reason for a failure occurred.
        examples: by kind of reason, the first rows that failed, each as row id and reason.
        values: by principal, over the drawn tokens: answers, tokens, lowest and highest q in nats.
        recoveries: how often each kind of fault was recovered from, where it is not 0.
        unsteered: answers whose weights are all 0.
        failed_at: of the rows without any answer, their places among the rows of the shard, from 0; None in a record
            of an earlier version.
        revision: 0, or how often rows of the shard were run again and took the place of those before.
        reruns: how many rows were, over all revisions.
        passes: of the base that gave an answer tokens, over all answers; each answer of a batch counts its own. 0 for
            games over blocks or answers, and in a record of an earlier version. Those of answers whose rows were run
            again stay counted, as in `seconds`.
        accepted: tokens that were proposed and drawn, and so took no pass of their own; likewise.
    """

    shard: int
    rows: int
    failed: int
    tokens: int
    sha256_by_file: Mapping[str, str]
    num_bytes: int
    digest: str
    committed_at: float
    pyarrow: str
    attempt: int = 1
    seconds: float = 0.0
    host: str = ""
    errors: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    recoveries: Mapping[str, int] = field(default_factory=dict)
    unsteered: int = 0
    failed_at: Sequence[int] | None = None
    revision: int = 0
    reruns: int = 0
    passes: int = 0
    accepted: int = 0

    @property
    def failures(self) -> dict[str, Failures]:
        """The failed answers by kind of reason."""
        return {
            kind: Failures(count, tuple(Example(*each) for each in self.examples.get(kind, ())))
            for kind, count in self.errors.items()
        }

    @property
    def value_ranges(self) -> dict[str, ValueRange]:
        """The values of each principal; empty for a record of an earlier version."""
        return {
            name: ValueRange(int(answers), int(tokens), low, high, *map(int, left_out))
            for name, (answers, tokens, low, high, *left_out) in self.values.items()
        }

    def to_json(self) -> bytes:
        tree = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> CommitRecord:
        """Read a stored record. Raises StorageError when it is not one."""
        try:
            tree = {**ABSENT_BEFORE, **json.loads(data)}
            tree.setdefault("failed", tree.get("rejected"))  # as earlier versions called it
            return cls(**{each.name: tree[each.name] for each in fields(cls)})
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StorageError(f"{source} is not a commit record; remove it to compute the shard again") from None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def order_records(
    records: Iterable[Record], row_ids: Sequence[str], *, num_variants: int = 1, num_samples: int, shard: int
) -> list[Record]:
    """Sort records in the order of `row_ids`, then by variant and sample; each answer is there exactly once.

    A row has one record per variant and sample. A row that failed before its first answer may have a single
    failed record instead.

    Raises:
        CageError: a record is missing, is there twice, or is of no row of the shard. This is a bug of the program;
            committing would lose or repeat a row.
    """
    wanted = set(product(range(num_variants), range(num_samples)))
    by_row: dict[str, dict[tuple[int, int], Record]] = {row_id: {} for row_id in row_ids}
    for record in records:
        answers = by_row.get(record.row_id)
        key = (record.variant, record.sample)
        what = f"row {record.row_id!r}, variant {record.variant}, sample {record.sample}"
        if answers is None or key not in wanted:
            raise CageError(f"shard {shard} has no {what}")
        if key in answers:
            raise CageError(f"shard {shard} got {what} twice")
        answers[key] = record
    for row_id, answers in by_row.items():
        whole_row_failed = list(answers) == [(0, 0)] and answers[0, 0].is_failed
        if len(answers) != len(wanted) and not whole_row_failed:
            raise CageError(f"shard {shard} got {len(answers)} of {len(wanted)} samples of row {row_id!r}")
    return [answers[key] for answers in by_row.values() for key in sorted(answers)]


def count_tokens(table: pa.Table) -> int:
    return int(sum(table.column("num_tokens").to_pylist()))


def differing_rows(first: pa.Table, second: pa.Table) -> list[tuple[str, int, int]]:
    """The (row_id, variant, sample) that both tables have, with different values (NaN equals NaN)."""
    left, right = _by_key(first), _by_key(second)
    common = [key for key in left if key in right]
    return [key for key in common if repr(left[key]) != repr(right[key])]


def _by_key(table: pa.Table) -> dict[tuple[str, int, int], Any]:
    return {(row["row_id"], row.get("variant", 0), row["sample"]): row for row in table.to_pylist()}
