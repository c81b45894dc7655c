"""One output directory: plan, data files, commit records, manifest. Safe against kills and a second driver."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.errors import CageError, ConfigurationError
from pipeline.monitoring.counts import Recoveries
from pipeline.records import Record
from pipeline.storage.card import render_card, render_manifest
from pipeline.storage.commits import CommitRecord, add_reasons, order_records
from pipeline.storage.plan import Plan, Shard, refuse_mismatch
from pipeline.storage.shard_files import COMMITS, REJECTED, ShardWriter, as_damaged_file
from pipeline.storage.stores import ObjectStore, Store, open_store

PLAN, MANIFEST, CARD, SUCCESS = "plan.json", "manifest.json", "README.md", "_SUCCESS"
COMMIT_NAME = re.compile(re.escape(COMMITS) + r"part-(\d+)\.json")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far a run is. Rows are records: one an input row, variant and sample."""

    path: str
    digest: str
    num_shards: int
    num_rows: int
    shards_done: int
    rows_aligned: int
    rows_rejected: int
    tokens: int
    seconds: float
    errors: Mapping[str, int]
    recoveries: Recoveries
    attempts_lost: int
    last_commit_at: float | None
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory and its plan. Plain data: it travels to the processes that commit."""

    store: Store
    plan: Plan

    @classmethod
    def create_or_resume(cls, store: Store, plan: Plan) -> Run:
        """Write the plan of a new run, or check that the stored one has the same fingerprint.

        Raises:
            RunMismatch: the directory holds a run with another fingerprint; the message says how it differs.
            ConfigurationError: it holds data of something else, or the store cannot create-only.
        """
        if store.read(PLAN) is None:
            if store.names("part-"):
                raise ConfigurationError(f"{store.path} holds part- files but no run; choose another output.path")
            if store.create(PLAN, plan.to_json()):
                _check_exclusive(store, plan)
                return cls(store, plan)
        stored = _read_plan(store)
        refuse_mismatch(store.path, stored.fingerprint, plan.fingerprint)
        if stored != plan:  # the same run, but its input has moved or it runs elsewhere
            store.put(PLAN, plan.to_json())
        return cls(store, plan)

    @classmethod
    def open(cls, path: str) -> Run:
        """Open an existing run from its files alone. Raises ConfigurationError when there is none."""
        store = open_store(path)
        return cls(store, _read_plan(store))

    @property
    def is_complete(self) -> bool:
        return self.store.read(SUCCESS) is not None

    def committed(self) -> dict[int, CommitRecord]:
        """The commit records by shard, by one listing and the reading of the records at once."""
        names = [name for name in self.store.names(COMMITS) if COMMIT_NAME.fullmatch(name)]
        found = self.store.read_many(names)
        records = [self._writer.read_record(name, data) for name, data in found.items()]
        return {record.shard: record for record in sorted(records, key=lambda record: record.shard)}

    def commit_of(self, shard: int) -> CommitRecord | None:
        """The shard's commit record, or None when it is not committed."""
        writer = self._writer
        data = self.store.read(name := writer.commit_name(shard))
        return None if data is None else writer.read_record(name, data)

    def pending(self) -> list[Shard]:
        """The shards that are not committed, in order; by one listing, no record is read."""
        found = (COMMIT_NAME.fullmatch(name) for name in self.store.names(COMMITS))
        done = {int(name[1]) for name in found if name is not None}
        return [shard for shard in self.plan.shards if shard.index not in done]

    def commit(
        self,
        shard: Shard | int,
        records: Iterable[Record],
        *,
        attempt: int = 1,
        seconds: float = 0.0,
        host: str = "",
        row_ids: Sequence[str] | None = None,
        recoveries: Recoveries | None = None,
    ) -> CommitRecord:
        """Write a finished shard and commit it; committing it again changes nothing.

        `records` come in any order; they are written in the order of `row_ids` (read from the input when None),
        then by variant and sample. Records with an error go to the rejected file.

        Raises:
            CageError: a row of the shard is missing or twice.
            NondeterminismError: the shard exists with other values for the same row (strict reproducibility).
            StorageError: the directory cannot be written.
        """
        shard = self.plan.shards[shard] if isinstance(shard, int) else shard
        if row_ids is None:
            row_ids = [row.row_id for row in self.plan.read_shard(shard)]
        ordered = order_records(
            records,
            row_ids,
            num_variants=len(self.plan.variants),
            num_samples=self.plan.num_samples,
            shard=shard.index,
        )
        return self._writer.commit(
            shard, ordered, attempt=attempt, seconds=seconds, host=host, recoveries=recoveries or Recoveries()
        )

    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write manifest, data set card and, last, `_SUCCESS`. `extra` is put into the manifest.

        Raises:
            CageError: shards are missing.
        """
        records = self.committed()
        names = {name for record in records.values() for name in record.sha256_by_file}
        stored = {*self.store.names("part-"), *self.store.names(REJECTED)}
        if len(records) < len(self.plan.shards) or not names <= stored:
            missing = len(self.plan.shards) - len(records)
            raise CageError(
                f"{self.store.path} is not complete: {missing} shards and {len(names - stored)} files missing"
            )
        for name in stored - names:
            if name.startswith(REJECTED):  # of an attempt that did not stand
                self.store.remove(name)
        self.store.sweep()
        status = self.status(records)
        self.store.put(MANIFEST, render_manifest(self.plan, records, status.errors, status.recoveries, extra or {}))
        self.store.put(CARD, render_card(self.plan, records, status.errors))
        self.store.put(SUCCESS, f"{self.plan.digest}\n".encode())

    def status(self, records: Mapping[int, CommitRecord] | None = None) -> RunStatus:
        """Sum up the commit records (those given, or those in the directory)."""
        done = list((self.committed() if records is None else records).values())
        return RunStatus(
            path=self.store.path,
            digest=self.plan.digest,
            num_shards=len(self.plan.shards),
            num_rows=self.plan.num_answers,
            shards_done=len(done),
            rows_aligned=sum(record.rows for record in done),
            rows_rejected=sum(record.rejected for record in done),
            tokens=sum(record.tokens for record in done),
            seconds=sum(record.seconds for record in done),
            errors=add_reasons(record.errors for record in done),
            recoveries=sum((Recoveries(**record.recoveries) for record in done), Recoveries()),
            attempts_lost=sum(record.attempt - 1 for record in done),
            last_commit_at=max((record.committed_at for record in done), default=None),
            is_complete=self.is_complete,
        )

    def find(self, row_id: str) -> list[dict[str, Any]]:
        """The stored records of a row, every sample, aligned or rejected; empty when it is not (yet) there.

        Looks at each file's statistics, then at its row ids, and reads the other columns of one file only.
        """
        for record in self.committed().values():
            rows = [row for name in record.sha256_by_file for row in self._find_in(name, row_id)]
            if rows:
                return sorted(rows, key=lambda row: (row.get("variant", 0), row["sample"]))
        return []

    @property
    def _writer(self) -> ShardWriter:
        return ShardWriter(self.store, self.plan)

    def _find_in(self, name: str, row_id: str) -> list[dict[str, Any]]:
        with as_damaged_file(self.store.url(name)), self.store.open(name) as handle, pq.ParquetFile(handle) as file:
            if file.metadata.num_rows == 0 or not _may_hold(file.metadata, row_id):
                return []
            ids = file.read(columns=["row_id"]).column("row_id").to_pylist()
            wanted = [index for index, found in enumerate(ids) if found == row_id]
            return list(file.read().take(wanted).to_pylist()) if wanted else []


def _read_plan(store: Store) -> Plan:
    data = store.read(PLAN)
    if data is None:
        raise ConfigurationError(f"there is no run in {store.path}: it has no {PLAN}")
    return Plan.from_json(data, source=store.url(PLAN))


def _check_exclusive(store: Store, plan: Plan) -> None:
    """Some S3-compatible stores ignore If-None-Match; two writers could then both win."""
    if isinstance(store, ObjectStore) and store.create(PLAN, plan.to_json()):
        raise ConfigurationError(f"{store.path} is in a store without create-only writes (If-None-Match)")


def _may_hold(metadata: pq.FileMetaData, row_id: str) -> bool:
    """Whether a file's statistics allow that it holds the row; row_id is its first column."""
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(0).statistics
        if statistics is None or not statistics.has_min_max or statistics.min <= row_id <= statistics.max:
            return True
    return False
