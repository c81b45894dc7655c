"""The files of one shard, and the order in which they are written.

1. The file with the failed rows, if there are any. Its name contains its hash, so that attempts in which other rows
   fail do not collide.
2. The data file. It is created and never replaced, so the first attempt to get here decides the shard. Its footer
   names the file of step 1: whoever sees the data file finds the failed rows that belong to it.
3. The commit record. It is made from the data file that is stored, so that every attempt at a shard arrives at the
   same record. What no file says, such as values, is that of the records in memory whose answers the file has.

A process that is killed between two steps leaves files that the next attempt takes over or `Run.finish` removes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.sections import Reproducibility
from pipeline.errors import NondeterminismError, StorageError
from pipeline.inputs.kept import append_kept, from_text
from pipeline.monitoring.counts import Recoveries
from pipeline.monitoring.reasons import failures_of
from pipeline.monitoring.values import values_of
from pipeline.quoting import one_line, quote
from pipeline.records import Record
from pipeline.storage.commits import CommitRecord, count_tokens, differing_rows, sha256
from pipeline.storage.names import FAILED, PAIRS, commit_name, data_name, part_name
from pipeline.storage.pairs import has_pairs, pairs_bytes
from pipeline.storage.plan import Plan, Shard
from pipeline.storage.tables import failed_schema, output_schema, to_table, write_table_bytes
from pipeline.stores.store import Store

KEYS = ("row_id", "variant", "sample", "num_tokens")  # columns that tell answers apart
# in a data file's footer: the name of the file with its failed rows
FAILED_KEY, EARLIER_FAILED_KEY = b"cage.failed", b"cage.rejected"


@dataclass(frozen=True, slots=True)
class ShardWriter:
    """Writes and commits the shards of one run.

    Args:
        store: the run directory.
        plan: of the run; it decides names, columns and whether attempts must agree.
    """

    store: Store
    plan: Plan

    def commit(
        self,
        shard: Shard,
        ordered: Sequence[Record],
        *,
        kept: Mapping[str, Mapping[str, Any]],
        attempt: int,
        seconds: float,
        host: str,
        recoveries: Recoveries,
    ) -> CommitRecord:
        """Write the records of a shard, which `order_records` has ordered, and commit it; see `Run.commit`.

        `kept` has the values of the kept columns by row id.

        Returns the record that is stored: this attempt's or, where another one was faster, that one's.
        """
        revised = self.store.read(commit_name(self.plan, shard.index, 1))
        if revised is not None:  # a late attempt must not bring back the file that the revision has replaced
            return self.read_record(commit_name(self.plan, shard.index, 1), revised)
        schema = self.schema(shard.index)
        failed = self._table([record for record in ordered if record.is_failed], failed_schema(schema), kept)
        aligned = self._table([record for record in ordered if not record.is_failed], schema, kept)
        failed_name = self.write_failed(shard.index, failed)
        data = write_table_bytes(aligned, metadata={FAILED_KEY.decode(): failed_name})
        stored = self._write_first(shard, data, aligned)
        order = list(dict.fromkeys(record.row_id for record in ordered))
        name = data_name(self.plan, shard.index)
        found = read_table(stored, self.store.url(name))
        self.write_pairs(name, found)  # a committed shard has its pairs
        described, own = self.describe(shard.index, name, stored, found, order), _stored(ordered, found)
        accepted = sum(each.num_tokens - each.num_passes for each in own if each.num_passes)
        # games over blocks and answers are not counted; an answer that is not in memory has a pass for each token
        passes = sum(each.num_passes for each in own) if self.plan.has_proposals else described.tokens - accepted
        record = replace(
            described,
            attempt=attempt,
            seconds=round(seconds, 3),
            host=host,
            recoveries=_nonzero(recoveries),
            passes=passes,
            accepted=accepted,
            values={
                name: [
                    values.answers,
                    values.tokens,
                    values.low,
                    values.high,
                    *([values.left_out] * (values.left_out > 0)),
                ]
                for name, values in values_of(own).items()
                if math.isfinite(values.low) and math.isfinite(values.high)
            },
        )
        return self._create_record(record)

    def _table(self, records: Sequence[Record], schema: pa.Schema, kept: Mapping[str, Mapping[str, Any]]) -> pa.Table:
        table = to_table(records, schema)
        columns = from_text(self.plan.kept)
        return table if columns is None else append_kept(table, columns, [kept[each.row_id] for each in records])

    def schema(self, shard: int) -> pa.Schema:
        """The schema of a shard's files; its metadata carries fingerprint and model identities."""
        models = {f"cage.models.{place}": identity for place, identity in self.plan.models.items()}
        return output_schema(
            self.plan.principal_names,
            trace=self.plan.trace,
            has_response=self.plan.has_response,
            has_variants=self.plan.has_variants,
            has_units=self.plan.has_units,
            has_temperatures=self.plan.has_temperatures,
            has_tools=self.plan.has_tools,
            has_reasoning=self.plan.reasoning is not None,
            has_proposals=self.plan.has_proposals,
            metadata={"cage.fingerprint": self._digest(shard), **models},
        )

    def read_record(self, name: str, data: bytes) -> CommitRecord:
        """Read a stored commit record.

        Raises:
            StorageError: it is not a commit record, or belongs to another run.
        """
        url = self.store.url(name)
        record = CommitRecord.from_json(data, source=url)
        if not 0 <= record.shard < len(self.plan.shards) or record.digest != self._digest(record.shard):
            raise StorageError(f"{url} belongs to another run; remove it to go on")
        return record

    def _digest(self, shard: int) -> str:
        """Of the plan that has the shard first."""
        return self.plan.extent_of(shard).digest

    def write_failed(self, shard: int, failed: pa.Table) -> str:
        """Write the failed rows under a name with their hash; return the name, empty when there are none."""
        if failed.num_rows == 0:
            return ""
        data = write_table_bytes(failed)
        name = f"{FAILED}{part_name(self.plan, shard)}-{sha256(data)[:16]}.parquet"
        self.store.create(name, data)
        return name

    def write_pairs(self, name: str, aligned: pa.Table) -> None:
        """Write the pairs of the data file `name`, if it can have some."""
        if has_pairs(aligned.schema.names):
            self.store.create(f"{PAIRS}{name}", pairs_bytes(aligned))

    def _write_first(self, shard: Shard, data: bytes, aligned: pa.Table) -> bytes:
        """Create the data file, or take over the one that is already stored; return the stored bytes."""
        name = data_name(self.plan, shard.index)
        if self.store.create(name, data):
            return data
        stored = self.store.read(name)
        if stored is None:
            raise StorageError(f"{self.store.url(name)} disappeared while it was being committed")
        if stored != data:
            self._compare(shard, name, stored, aligned)
        return stored

    def _compare(self, shard: Shard, name: str, stored: bytes, aligned: pa.Table) -> None:
        """Check whether the file of another attempt can be taken over.

        A row may have failed in one of the attempts only, for instance because a host died. Where both have
        the row, its values must be equal, or the run is not as reproducible as it claims.
        """
        found = read_table(stored, self.store.url(name))
        if (found.schema.metadata or {}).get(b"cage.fingerprint", b"").decode() != self._digest(shard.index):
            raise StorageError(f"{self.store.url(name)} belongs to another run; remove it to go on")
        if self.plan.fingerprint["decoding.reproducibility"] != Reproducibility.STRICT:
            return
        differing = differing_rows(found, aligned)
        if differing:
            row_id, _, sample = differing[0]
            raise NondeterminismError(
                f"{self.store.url(name)} was computed twice with different values: {len(differing)} rows, "
                f"first row {quote(row_id)}, sample {sample}; remove it and its commit record to compute it again"
            )

    def describe(self, shard: int, name: str, data: bytes, aligned: pa.Table, order: Sequence[str]) -> CommitRecord:
        """The commit record of a data file and the failed rows that it names.

        Args:
            shard: its index.
            name: of the data file.
            data: its content.
            aligned: the table in it.
            order: the shard's row ids.
        """
        answered = set(aligned.column("row_id").to_pylist())
        files = {name: data}
        failed: list[tuple[str, str | None]] = []
        if failed_name := _failed_name(aligned.schema):
            failed_data = self.store.read(failed_name)
            if failed_data is None:
                raise StorageError(f"{self.store.url(failed_name)} is missing; remove {name} to go on")
            files[failed_name] = failed_data
            table = read_table(failed_data, self.store.url(failed_name))
            columns = (table.column(each).to_pylist() for each in ("row_id", "error"))
            failed = list(zip(*columns, strict=True))
        failures = failures_of(failed)
        return CommitRecord(
            shard=shard,
            rows=aligned.num_rows,
            failed=len(failed),
            tokens=count_tokens(aligned),
            sha256_by_file={name: sha256(content) for name, content in files.items()},
            num_bytes=sum(len(content) for content in files.values()),
            digest=self._digest(shard),
            committed_at=round(time.time(), 3),
            pyarrow=pa.__version__,
            unsteered=_unsteered(aligned),
            failed_at=[at for at, row_id in enumerate(order) if row_id not in answered],
            errors={kind: each.count for kind, each in failures.items()},
            examples={kind: [[e.row_id, e.reason] for e in each.examples] for kind, each in failures.items()},
        )

    def _create_record(self, record: CommitRecord) -> CommitRecord:
        name = commit_name(self.plan, record.shard)
        if self.store.create(name, record.to_json()):
            return record
        stored = self.store.read(name)
        if stored is None:
            raise StorageError(f"{self.store.url(name)} disappeared while it was being committed")
        winner = self.read_record(name, stored)
        if dict(winner.sha256_by_file) != dict(record.sha256_by_file):
            raise NondeterminismError(
                f"shard {record.shard} of {self.store.path} is committed with other files than those that are there"
            )
        return winner


def _stored(records: Sequence[Record], table: pa.Table) -> list[Record]:
    """The records whose answers are in a data file, which another attempt may have written."""
    names = [each for each in KEYS if each in table.column_names]  # without a grid there is one variant
    answers = set(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    return [each for each in records if tuple(getattr(each, name) for name in names) in answers]


def _failed_name(schema: pa.Schema) -> str:
    """The file of failed rows that a data file names; empty where it has none."""
    footer = schema.metadata or {}
    return (footer.get(FAILED_KEY) or footer.get(EARLIER_FAILED_KEY) or b"").decode()


def _unsteered(answers: pa.Table) -> int:
    """How many answers have weights that are all 0."""
    if "weights" not in answers.schema.names:
        return 0
    return sum(not any((each or {"": 1}).values()) for each in answers.column("weights").to_pylist())


def _nonzero(recoveries: Recoveries) -> dict[str, int]:
    return {name: count for name, count in asdict(recoveries).items() if count}


def read_table(data: bytes, source: str) -> pa.Table:
    """The table in a Parquet file that was read from `source`. Raises StorageError."""
    with as_damaged_file(source), pq.ParquetFile(pa.BufferReader(data)) as file:
        table: pa.Table = file.read()
        return table


@contextlib.contextmanager
def as_damaged_file(source: str) -> Iterator[None]:
    """Raise a failure to read a stored Parquet file as a StorageError that names `source`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{source} cannot be read: {one_line(error)}") from error
