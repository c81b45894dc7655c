"""New revisions of committed shards: rows that were run again take the place of those before.

Nothing is overwritten. A revision of a shard is

1. a file with its failed rows, and its data file in `_revised/`, both under names with their hashes;
2. a commit record of its own, which is created and never replaced: of several commands one is first, and the others
   make the next revision on top of it;
3. published: the data file before is moved to `_superseded/`, and the new one gets its place among the data files.

Between the two halves of step 3 readers find neither file, and at no time both. A command that is killed there leaves
the rest to the next one that finishes the run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import ConfigurationError, StorageError
from pipeline.storage.commits import CommitRecord, sha256
from pipeline.storage.names import (
    PAIRS,
    REVISED,
    SCORES,
    SUPERSEDED,
    commit_name,
    data_name,
    is_of_failed_rows,
    part_name,
)
from pipeline.storage.plan import Plan
from pipeline.storage.shard_files import FAILED_KEY, ShardWriter, read_table
from pipeline.storage.tables import failed_schema, write_table_bytes
from pipeline.stores.store import Store

STAGED_NAME = re.compile(re.escape(REVISED) + r"part-(\d+)-of-\d+\.(\d+)-\w+\.parquet")
MOST_TRIES = 100  # of commands that revise one shard at the same time


@dataclass(frozen=True, slots=True)
class Rerun:
    """Rows of one shard that were run again.

    Args:
        answers: the new answers; None for none.
        failed: those that failed; None for none.
        new_id_by_old: every row that was run again: its id in the run, and the one that it has now.
        seconds: how long it took.
        passes: of the base that gave the new answers tokens.
        accepted: tokens of the new answers that were proposed and drawn.
    """

    answers: pa.Table | None
    failed: pa.Table | None
    new_id_by_old: Mapping[str, str]
    seconds: float = 0.0
    passes: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Reviser:
    """Commits and publishes revisions of the shards of one run.

    Args:
        store: the run directory.
        plan: of the run.
    """

    store: Store
    plan: Plan

    def revise(self, record: CommitRecord, rerun: Rerun) -> CommitRecord:
        """Commit the next revision of a shard, with rows that were run again, and publish it.

        Args:
            record: of the newest revision, which is published.
            rerun: the rows.
        """
        for _ in range(MOST_TRIES):
            data, order = self._files(record, rerun)
            revision = record.revision + 1
            self.store.create(self._staged(record.shard, revision, sha256(data)), data)
            name = data_name(self.plan, record.shard, revision)
            answers = read_table(data, self.store.url(name))
            described = self._writer.describe(record.shard, name, data, answers, order)
            new = replace(
                described,
                revision=revision,
                reruns=record.reruns + len(rerun.new_id_by_old),
                seconds=round(record.seconds + rerun.seconds, 3),
                committed_at=round(time.time(), 3),
                attempt=record.attempt,
                host=record.host,
                recoveries=record.recoveries,
                values=record.values,
                passes=record.passes + rerun.passes,
                accepted=record.accepted + rerun.accepted,
            )
            name = commit_name(self.plan, record.shard, revision)
            if not self.store.create(name, new.to_json()):
                standing = self._read(record.shard, revision)
                if dict(standing.sha256_by_file) != dict(new.sha256_by_file):  # another command was faster
                    self.publish(standing)
                    record = standing
                    continue
                new = standing
            self.publish(new)
            return new
        raise StorageError(f"shard {record.shard} of {self.store.path} is revised by other commands all the time")

    def publish(self, record: CommitRecord) -> None:
        """Put a revision's data file in the place of the one before; doing so again changes nothing."""
        if record.revision == 0:
            return
        data = self._data_of(record)
        for revision in range(record.revision):
            self._supersede(self._read(record.shard, revision), kept=record.sha256_by_file)
        name = data_name(self.plan, record.shard, record.revision)
        self.store.create(name, data)
        self._writer.write_pairs(name, read_table(data, self.store.url(name)))
        self.store.remove(self._staged(record.shard, record.revision, record.sha256_by_file[name]))

    @property
    def _writer(self) -> ShardWriter:
        return ShardWriter(self.store, self.plan)

    def _staged(self, shard: int, revision: int, digest: str) -> str:
        return f"{REVISED}{part_name(self.plan, shard, revision)}-{digest[:16]}.parquet"

    def _read(self, shard: int, revision: int) -> CommitRecord:
        name = commit_name(self.plan, shard, revision)
        data = self.store.read(name)
        if data is None:
            raise StorageError(f"{self.store.url(name)} is missing")
        return self._writer.read_record(name, data)

    def _data_of(self, record: CommitRecord) -> bytes:
        """The data file of a revision: in its place, not there yet, or not there any more."""
        name = data_name(self.plan, record.shard, record.revision)
        return self._find(name, self._staged(record.shard, record.revision, record.sha256_by_file[name]))

    def _find(self, name: str, *others: str) -> bytes:
        # its own name twice: another command may move it there in between
        for place in (name, *others, SUPERSEDED + name.lstrip("_"), name):
            if (data := self.store.read(place)) is not None:
                return data
        raise StorageError(f"{self.store.url(name)} is missing")

    def sweep(self, records: Mapping[int, CommitRecord]) -> None:
        """Remove what killed commands have left of revisions that are published."""
        for name in self.store.names(REVISED):
            found = STAGED_NAME.fullmatch(name)
            record = None if found is None else records.get(int(found[1]))
            if found is not None and record is not None and int(found[2]) <= record.revision:
                self.store.remove(name)

    def _supersede(self, record: CommitRecord, *, kept: Mapping[str, str]) -> None:
        """Move the files of an earlier revision away, but for those that the new one has, too."""
        for name in record.sha256_by_file:
            data = None if name in kept else self.store.read(name)
            if data is not None:
                self.store.create(SUPERSEDED + name.lstrip("_"), data)
                self.store.remove(name)
            if not is_of_failed_rows(name):  # what is made from a data file
                self.store.remove(PAIRS + name)
                self.store.remove(SCORES + name)

    def _files(self, record: CommitRecord, rerun: Rerun) -> tuple[bytes, list[str]]:
        """The data file of the next revision, and its row ids in order; its failed rows are written."""
        schema = self._writer.schema(record.shard)
        name = data_name(self.plan, record.shard, record.revision)
        answers = read_table(self._data_of(record), self.store.url(name))
        failed = [self._failed_of(each) for each in record.sha256_by_file if is_of_failed_rows(each)]
        order = self._order(record, answers, failed)
        place_by_id = {rerun.new_id_by_old.get(row_id, row_id): at for at, row_id in enumerate(order)}
        with_failed = _with_columns(failed_schema(schema), self._kept_fields(answers))
        new_failed = _merge(with_failed, failed, rerun.failed, rerun.new_id_by_old, place_by_id)
        failed_name = self._writer.write_failed(record.shard, new_failed)
        with_answers = _with_columns(schema, self._kept_fields(answers))
        new_answers = _merge(with_answers, [answers], rerun.answers, rerun.new_id_by_old, place_by_id)
        data = write_table_bytes(new_answers, metadata={FAILED_KEY.decode(): failed_name})
        return data, list(place_by_id)

    def _failed_of(self, name: str) -> pa.Table:
        return read_table(self._find(name), self.store.url(name))

    def _kept_fields(self, answers: pa.Table) -> list[pa.Field]:
        return list(answers.schema)[len(self._writer.schema(0)) :]

    def _order(self, record: CommitRecord, answers: pa.Table, failed: Sequence[pa.Table]) -> list[str]:
        """The shard's row ids as the input has them: those with answers around the places of the others."""
        answered = list(dict.fromkeys(answers.column("row_id").to_pylist()))
        there = set(answered)
        others = dict.fromkeys(each for table in failed for each in table.column("row_id").to_pylist())
        without = [row_id for row_id in others if row_id not in there]
        places = record.failed_at
        if places is None:  # of an earlier version
            return self._order_of_input(record.shard, [*answered, *without])
        at_place = dict(zip(places, without, strict=True))
        rest = iter(answered)
        return [at_place[at] if at in at_place else next(rest) for at in range(len(answered) + len(without))]

    def _order_of_input(self, shard: int, row_ids: Sequence[str]) -> list[str]:
        try:
            place_by_id = {row.row_id: at for at, row in enumerate(self.plan.read_shard(shard))}
        except (ConfigurationError, StorageError):  # it is gone: answers come first, then the rows that had failed
            return list(row_ids)
        return sorted(row_ids, key=lambda row_id: place_by_id.get(row_id, len(place_by_id)))


def _with_columns(schema: pa.Schema, fields: Sequence[pa.Field]) -> pa.Schema:
    for field in fields:
        schema = schema.append(field)
    return schema


def _merge(
    schema: pa.Schema,
    before: Sequence[pa.Table],
    new: pa.Table | None,
    rerun: Mapping[str, str],
    place_by_id: Mapping[str, int],
) -> pa.Table:
    """The rows of `before` that were not run again, and the new ones, in the order of the input."""
    gone = rerun.keys()
    pieces = [_fitted(table, schema) for table in (*before, *((new,) if new is not None else ()))]
    keys = []
    for number, (start, piece) in enumerate(_with_starts(pieces)):
        is_new = new is not None and number == len(pieces) - 1
        names = [name for name in ("row_id", "variant", "sample") if name in piece.schema.names]
        for at, (row_id, *rest) in enumerate(zip(*(piece.column(name).to_pylist() for name in names), strict=True)):
            if is_new or row_id not in gone:
                keys.append((place_by_id[row_id], *rest, start + at))
    table = pa.concat_tables(pieces) if pieces else schema.empty_table()
    return table.take(pa.array([key[-1] for key in sorted(keys)], pa.int64()))


def _with_starts(pieces: Sequence[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    for piece in pieces:
        yield start, piece
        start += piece.num_rows


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`; those that a table of an earlier version lacks are null."""
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.schema.names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
