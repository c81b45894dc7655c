"""Which rows of a run are run again: those that failed, or those that a mended input has with other content."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigurationError
from pipeline.inputs.files import Format
from pipeline.inputs.kept import append_kept, from_text
from pipeline.inputs.source import InputSource
from pipeline.inputs.tool_use import as_stored
from pipeline.quoting import quote
from pipeline.records import Row
from pipeline.storage.commits import CommitRecord
from pipeline.storage.failed_rows import failed_of, read_stored
from pipeline.storage.names import is_of_failed_rows
from pipeline.storage.plan import Plan, Shard
from pipeline.storage.run import Run

SHOWN_IDS = 5
CACHED_SHARDS = 8  # whose answers are in memory while a mended input is compared with them


@dataclass(frozen=True, slots=True)
class Choice:
    """The rows to run again, in the input that has them.

    Args:
        source: that input.
        shards: those of it that have such a row.
        ids: of the rows, as the source has them.
        new_id_by_old: by shard of the run, the id of each such row in the run, and in the source.
        notes: what is left out, one line each.
    """

    source: InputSource
    shards: tuple[Shard, ...]
    ids: frozenset[str]
    new_id_by_old: Mapping[int, Mapping[str, str]]
    notes: tuple[str, ...] = ()


def refuse_unknown(path: str, only: Collection[str], known: Collection[str], what: str) -> None:
    """Raise ConfigurationError where one of the ids `only` is not `known`."""
    if unknown := [row_id for row_id in only if row_id not in known]:
        shown = ", ".join(quote(row_id) for row_id in unknown[:SHOWN_IDS])
        raise ConfigurationError(f"{path} has no {what} of the id {shown}")


def choose_failed(run: Run, only: Collection[str]) -> Choice:
    """The failed rows that could be read, in the input of the run.

    Args:
        run: the run.
        only: ids of such rows; empty for all of them.

    Raises:
        ConfigurationError: there is no such row.
    """
    found = {shard: {row["row_id"]: row["row_id"] for row in rows} for shard, rows in failed_of(run)}
    known = {row_id for ids in found.values() for row_id in ids}
    refuse_unknown(run.store.path, only, known, "failed row that can be tried again")
    wanted = frozenset(only or known)
    if not wanted:
        raise ConfigurationError(
            f"{run.store.path} has no failed row that can be tried again; rows that could not be read are mended in "
            "the input, and run again by `cage retry RUN --input FILE`"
        )
    chosen = {shard: {each: each for each in ids if each in wanted} for shard, ids in found.items()}
    chosen = {shard: ids for shard, ids in chosen.items() if ids}
    source = run.plan.open_input()
    # an id that a later row has, too, was this row's alone when it was answered
    source = source.reading(repeated_ids=source.columns.repeated_ids - wanted)
    shards = tuple(replace(run.plan.shards[shard], index=at) for at, shard in enumerate(sorted(chosen)))
    return Choice(source, shards, wanted, chosen)


def choose_mended(run: Run, source: InputSource, shards: Collection[Shard], only: Collection[str]) -> Choice:
    """The rows of a mended input that failed in the run, or that it has with other content.

    A row is known by its id; one that had no usable id, by its file and its place there.

    Args:
        run: the run.
        source: the mended input, read as the run reads its own.
        shards: of the mended input.
        only: ids of rows; empty for all that the input has.

    Raises:
        ConfigurationError: the input has rows that the run does not have.
    """
    places, failed = _places(run)
    stored = _StoredRows(run)
    num_known = {file.name: file.num_rows for file in run.plan.files}
    chosen: dict[int, dict[str, str]] = {}
    ids: set[str] = set()
    unknown, num_more = [], 0
    used = []
    for shard in shards:
        name, num_before = source.files[shard.file].name, len(ids)
        for at, row, kept in _read(source, shard):
            position = f"{name}:{row.number}"
            old_id = row.row_id if row.row_id in places else position if position in failed else None
            if old_id is None:
                num_more += at >= num_known.get(name, at + 1)
                unknown += [row.row_id] if at < num_known.get(name, at + 1) else []
            elif (not only or {old_id, row.row_id} & set(only)) and (
                old_id in failed or stored.differs(places[old_id], row, kept)
            ):
                chosen.setdefault(places[old_id], {})[old_id] = row.row_id
                ids.add(row.row_id)
        used += [shard] if len(ids) > num_before else []
    notes = [f"{num_more:,} rows that the run does not have are left; --extend adds rows"] if num_more else []
    if unknown and run.pending():
        notes.append(
            f"{len(unknown):,} rows are left, because the run has not answered them yet, or does not have them"
        )
    elif unknown:
        shown = ", ".join(quote(row_id) for row_id in unknown[:SHOWN_IDS]) + (", ..." if unknown[SHOWN_IDS:] else "")
        raise ConfigurationError(
            f"{len(unknown):,} rows of the mended input are not in {run.store.path}: {shown}; rows are known by "
            "their ids (input.id), or by the name of their file and their place in it"
        )
    refuse_unknown(run.store.path, only, {*places, *ids}, "row")
    renumbered = tuple(replace(shard, index=at) for at, shard in enumerate(used))
    return Choice(source, renumbered, frozenset(ids), chosen, tuple(notes))


def _read(source: InputSource, shard: Shard) -> Iterator[tuple[int, Row, dict[str, Any]]]:
    """The rows of a shard with their numbers in the file and their kept values."""
    rows = source.read_rows(shard.file, shard.start, shard.stop)
    if source.kept is None:
        yield from ((at, row, {}) for at, row in enumerate(rows, shard.start))
        return
    kept = source.read_kept(shard.file, shard.start, shard.stop)
    yield from ((at, row, each) for at, (row, each) in enumerate(zip(rows, kept, strict=True), shard.start))


def _places(run: Run) -> tuple[dict[str, int], set[str]]:
    """The shard of each committed row, and the rows without any answer."""
    places: dict[str, int] = {}
    failed: set[str] = set()
    for shard, record in run.committed().items():
        for name in sorted(record.sha256_by_file, key=is_of_failed_rows):  # answers first
            for row_id in read_stored(run.store, name, ["row_id"])["row_id"].to_pylist():
                failed |= {row_id} if is_of_failed_rows(name) and row_id not in places else set()
                places[row_id] = shard
    return places, failed


@dataclass(slots=True)
class _StoredRows:
    """The content of the rows that a run has answered, to compare rows of its input with."""

    run: Run
    _records: Mapping[int, CommitRecord] = field(default_factory=dict)
    _shards: OrderedDict[int, dict[str, dict[str, Any]]] = field(default_factory=OrderedDict)

    def differs(self, shard: int, row: Row, kept: Mapping[str, Any]) -> bool:
        """Whether a row is another one than the run has answered, or may be: its parameters are not stored."""
        plan, stored = self.run.plan, self._rows(shard)[row.row_id]
        has_parameters = any(
            file.format is Format.BATCH
            or file.columns.template_kwargs is not None
            or file.columns.candidates is not None
            for file in plan.files
        )
        if has_parameters or row.error is not None:
            return True
        messages, begun = list(row.messages), ""
        if messages[-1]["role"] == "assistant":
            begun = str(messages.pop()["content"])
        if _plain([as_stored(each) for each in messages]) != _plain(stored["prompt"]):
            return True
        if begun and not (stored["response"] or "").startswith(begun):
            return True
        if plan.has_response and row.response != stored["original_response"]:
            return True
        if plan.has_tools and list(row.tools) != json.loads(stored["tools"] or "[]"):
            return True
        return self._weights_differ(row, stored) or self._kept_differ(stored, kept)

    def _weights_differ(self, row: Row, stored: Mapping[str, Any]) -> bool:
        config = self.run.plan.config
        if config["grid"]["weights"] or not self.run.plan.principal_names:
            return False
        configured = {name: section["weight"] for name, section in config["principals"].items()}
        return bool({**configured, **(row.weights or {})} != stored["weights"])

    def _kept_differ(self, stored: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
        schema = from_text(self.run.plan.kept)
        if schema is None:
            return False
        one_row = append_kept(pa.table({"row": [0]}), schema, [kept])  # refuses what the columns cannot hold
        # by their text, which is equal for two that are no number, too
        return any(repr(one_row.column(name)[0].as_py()) != repr(stored[name]) for name in schema.names)

    def _rows(self, shard: int) -> dict[str, dict[str, Any]]:
        if not self._records:
            self._records = self.run.committed()
        if shard not in self._shards:
            names = [name for name in self._records[shard].sha256_by_file if not is_of_failed_rows(name)]
            wanted = ["row_id", "prompt", "response", "weights", "original_response", "tools"]
            kept = from_text(self.run.plan.kept)
            wanted += [] if kept is None else kept.names
            rows = [row for name in names for row in read_stored(self.run.store, name, wanted).to_pylist()]
            self._shards[shard] = {row["row_id"]: row for row in rows}
            while len(self._shards) > CACHED_SHARDS:
                self._shards.popitem(last=False)
        return self._shards[shard]


def _plain(value: Any) -> Any:
    """Messages without the keys that are null."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    return value


def plan_of(choice: Choice, plan: Plan) -> Plan:
    """A plan of the chosen rows alone, out of one of their whole input."""
    return replace(plan, files=choice.source.files, shards=choice.shards, only=choice.ids)
