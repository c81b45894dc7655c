"""One output directory: plan, data files, commit records, manifest. Safe against kills and a second driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CageError, StorageError
from pipeline.monitoring.counts import Recoveries
from pipeline.records import Record
from pipeline.storage.card import render_card, render_loading, render_manifest
from pipeline.storage.commits import CommitRecord, order_records
from pipeline.storage.names import (
    CARD,
    COMMIT_NAME,
    COMMITS,
    EARLIER_FAILED,
    FAILED,
    LOADING_FILE,
    MANIFEST,
    PLAN,
    SUCCESS,
    commit_name,
    data_name,
    is_of_failed_rows,
    shard_of,
)
from pipeline.storage.plan import Plan, Shard, refuse_mismatch
from pipeline.storage.plan_files import check_exclusive, has_plan, plan_name, read_plan, refuse_other_files
from pipeline.storage.revisions import Rerun, Reviser
from pipeline.storage.row_lookup import find_row
from pipeline.storage.run_status import RunStatus, sum_up
from pipeline.storage.shard_files import ShardWriter
from pipeline.stores.store import Store, open_store


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory and its plan.

    Any number of processes may work on one run at the same time, and each may be killed at any time: a shard counts
    exactly if its commit record exists, records are only ever created, and whoever computes a shard again arrives at
    the same files. A run is plain data and can be sent to the processes that commit.

    Args:
        store: the directory.
        plan: the newest that is stored. Use `create_or_resume` or `open`, which see to that.
    """

    store: Store
    plan: Plan

    @classmethod
    def create_or_resume(cls, store: Store, plan: Plan) -> Run:
        """Write the plan of a new run, or check that the stored one has the same fingerprint.

        Args:
            store: the directory, empty or with a run.
            plan: what is to be computed. Where only its other parts differ from the stored plan (the input was
                moved, the cluster is another one), it replaces it.

        Raises:
            RunMismatch: the directory holds a run with another fingerprint; the message says how it differs.
            ConfigurationError: it holds other files and no run, or the store cannot create-only.
        """
        if not has_plan(store):
            refuse_other_files(store)
            if store.create(PLAN, plan.to_json()):
                check_exclusive(store)
                return cls(store, plan)
            # another driver was faster: its plan is checked like that of any earlier run
        stored = read_plan(store)
        # a run that goes on another day keeps its time; whether its base reasons as before is seen when models are
        # looked at (`pipeline.stages.relabel`)
        plan = plan.as_begun(stored)
        refuse_mismatch(store.path, stored.fingerprint, plan.fingerprint)
        plan = stored.moved_to(plan)
        if stored != plan:
            store.put(plan_name(plan.revision), plan.to_json())
        return cls(store, plan)

    def extend(self, plan: Plan) -> Run:
        """Add shards to the run: write the next revision of its plan, beside the earlier ones.

        Args:
            plan: this run's plan with more shards, as `extend_plan` makes it.

        Raises:
            StorageError: another command has extended the run in another way.
        """
        name = plan_name(plan.revision)
        if not self.store.create(name, plan.to_json()):
            standing = read_plan(self.store)
            if standing.fingerprint != plan.fingerprint:
                raise StorageError(
                    f"another command has extended {self.store.path} at the same time; the same command goes on"
                )
            plan = standing
        self.store.remove(SUCCESS)  # of the shards before
        return Run(self.store, plan)

    @classmethod
    def open(cls, path: str, *, open_store: Callable[[str], Store] = open_store) -> Run:
        """Open an existing run. Only its plan is read; neither the input nor the models have to be there.

        Args:
            path: the run directory, local or in an object store.
            open_store: makes the store from the path, for callers that wrap it.

        Raises:
            ConfigurationError: there is no run, or its plan is damaged or of another version.
        """
        store = open_store(path)
        return cls(store, read_plan(store))

    @property
    def is_complete(self) -> bool:
        """Whether `finish` has come to its end for this plan, by whichever process; reads the store."""
        return self.store.read(SUCCESS) == self._success

    def begin(self) -> None:
        """Look whether the store can create-only, before shards are decoded.

        The mark of a finished run is taken away where it is of the shards before an extension, or there for nothing.

        Raises:
            ConfigurationError: the store lets a second writer win.
        """
        check_exclusive(self.store)
        if not self.is_complete:
            self.store.remove(SUCCESS)

    def reopen(self) -> None:
        """Take away the mark of a finished run before rows of it are replaced; `finish` writes it again."""
        self.store.remove(SUCCESS)

    @property
    def is_superseded(self) -> bool:
        """Whether the run was extended beyond this plan, by another command; reads the store."""
        return self.store.read(plan_name(self.plan.revision + 1)) is not None

    @property
    def _success(self) -> bytes:
        return f"{self.plan.digest}\n".encode()

    def committed(self) -> dict[int, CommitRecord]:
        """The commit records by shard. Costs one listing and the reading of every record.

        Raises:
            StorageError: a record is damaged, or of another run.
        """
        revisions = self.revisions()
        if self.is_superseded:
            revisions = {shard: number for shard, number in revisions.items() if shard < len(self.plan.shards)}
        names = [commit_name(self.plan, shard, revision) for shard, revision in revisions.items()]
        found = self.store.read_many(names)
        records = [self._writer.read_record(name, data) for name, data in found.items()]
        return {record.shard: record for record in sorted(records, key=lambda record: record.shard)}

    def revisions(self) -> dict[int, int]:
        """The newest revision of each committed shard, 0 for the first: costs a listing.

        A revision counts when its data file stands in the place of the one before. A command that was killed in
        between has left neither, and the newest counts; `finish` puts its file there.
        """
        found: dict[int, list[int]] = {}
        for name in self.store.names(COMMITS):
            if match := COMMIT_NAME.fullmatch(name):
                found.setdefault(int(match[1]), []).append(int(match[2] or 0))
        revised = {shard: numbers for shard, numbers in found.items() if len(numbers) > 1}
        newest = {shard: max(numbers) for shard, numbers in found.items()}
        if revised:
            published = set(self.store.names("part-"))
            for shard, numbers in revised.items():
                there = [number for number in numbers if data_name(self.plan, shard, number) in published]
                newest[shard] = max(there or numbers)
        return newest

    def commit_of(self, shard: int) -> CommitRecord | None:
        """The shard's commit record, or None when it is not committed."""
        data = self.store.read(name := commit_name(self.plan, shard))
        return None if data is None else self._writer.read_record(name, data)

    def pending(self) -> list[Shard]:
        """The shards that are not committed, in order. Costs one listing; no record is read."""
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
        """Write a finished shard and commit it.

        Committing a shard again changes nothing and returns the record of the first commit. It is also safe after a
        process was killed in here, and while another one commits the same shard.

        Args:
            shard: the shard or its index.
            records: one per row, variant and sample, in any order. Those with an error go to the file of failed rows.
            attempt: the number of this attempt at the shard, from 1.
            seconds: how long it took.
            host: where it ran.
            row_ids: the shard's row ids in the order of the input, which is the order of the files; None reads them
                from the input.
            recoveries: from faults on the way.

        Raises:
            CageError: a row of the shard is missing, or is there twice.
            NondeterminismError: the shard is already there with other values for the same row, and the run is
                strictly reproducible.
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
        kept = dict(zip(row_ids, self.plan.read_kept(shard), strict=True)) if self.plan.kept else {}
        return self._writer.commit(
            shard,
            ordered,
            kept=kept,
            attempt=attempt,
            seconds=seconds,
            host=host,
            recoveries=recoveries or Recoveries(),
        )

    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Write manifest, data set card and, last, `_SUCCESS`; finishing again writes the same.

        Args:
            extra: further values for the manifest, under "extra".

        Raises:
            CageError: shards are not committed, or files of committed ones are missing.
        """
        if self.is_superseded:  # whoever extended the run, or resumes it, finishes it
            return
        self.store.settle()  # first: what follows is written because of records whose writers may have died
        records = self.committed()
        for shard in self.plan.shards:  # listings of some object stores are behind: a read is not
            if shard.index not in records and (record := self.commit_of(shard.index)) is not None:
                records[shard.index] = record
        self._publish(records)
        names = {name for record in records.values() for name in record.sha256_by_file}
        stored = {name for folder in ("part-", FAILED, EARLIER_FAILED) for name in self.store.names(folder)}
        missing = [name for name in sorted(names - stored) if self.store.read(name) is None]
        if len(records) < len(self.plan.shards) or missing:
            raise CageError(
                f"{self.store.path} is not complete: {len(self.plan.shards) - len(records)} shards and "
                f"{len(missing)} files missing"
            )
        for name in sorted(stored - names):
            # of an attempt that was not the one committed, or that came after a revision
            is_late = shard_of(name) in records and records[shard_of(name)].revision > 0
            if (is_of_failed_rows(name) or is_late) and shard_of(name) < len(self.plan.shards):
                self.store.remove(name)
        self.store.sweep()
        status = self.status(records)
        self.store.put(MANIFEST, render_manifest(self.plan, records, status.errors, status.recoveries, extra or {}))
        self.store.put(CARD, render_card(self.plan, records, status.errors))
        self.store.put(LOADING_FILE, render_loading(self.plan))
        # Last: whoever sees this file finds all the others.
        self.store.put(SUCCESS, self._success)

    def _publish(self, records: Mapping[int, CommitRecord]) -> None:
        """Publish the revisions that a killed command has committed and not published."""
        newest = [record for record in records.values() if record.revision]
        if not newest:
            return
        reviser, there = Reviser(self.store, self.plan), set(self.store.names("part-"))
        for record in newest:
            if data_name(self.plan, record.shard, record.revision) not in there:
                reviser.publish(record)
        reviser.sweep(records)

    def revise(self, record: CommitRecord, rerun: Rerun) -> CommitRecord:
        """Commit the next revision of a shard with rows that were run again; see `Reviser.revise`."""
        return Reviser(self.store, self.plan).revise(record, rerun)

    def status(self, records: Mapping[int, CommitRecord] | None = None) -> RunStatus:
        """Sum up the commit records: those given, or those in the directory when None."""
        found = self.committed() if records is None else records
        return sum_up(self.store.path, self.plan, found.values(), is_complete=self.is_complete)

    def find(self, row_id: str) -> list[dict[str, Any]]:
        """The stored records of a row, by variant and sample, answered or failed; empty when there is none yet."""
        for record in self.committed().values():
            rows = [row for name in record.sha256_by_file for row in find_row(self.store, name, row_id)]
            if rows:
                return sorted(rows, key=lambda row: (row.get("variant", 0), row["sample"]))
        return []

    @property
    def _writer(self) -> ShardWriter:
        return ShardWriter(self.store, self.plan)
