"""Planted faults: production code with one thing wrong. The schedules must find each of them.

Each is a set of names that are bound to something else for a block, before the simulation binds its own.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from tenacity import stop_never

from pipeline.cluster.host_actors import RayHost
from pipeline.errors import HostError
from pipeline.protocol.messages import Position
from pipeline.storage.run import Run
from pipeline.storage.shard_files import ShardWriter
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.worker.hosts import PositionGuard
from simulation.disk import Disk, Folder

LOCAL, OBJECTS = "pipeline.stores.local_store", "pipeline.stores.object_store"
FILES, GUARD = "pipeline.storage.shard_files.ShardWriter", "pipeline.worker.hosts.PositionGuard"


def create_over(store: LocalStore | ObjectStore, name: str, data: bytes) -> bool:
    store.put(name, data)
    return True


def sync_folders_alone(disk: Disk, descriptor: int) -> None:
    if isinstance(disk._open[descriptor], Folder):
        _sync(disk, descriptor)


_sync = Disk.sync


def write_in_place(store: LocalStore, file: Any, data: bytes) -> bool:
    from pipeline.stores import local_store

    if not file.parent.is_dir():
        local_store._make_folder(file.parent)
    try:
        with file.open("xb") as handle:
            handle.write(data)
            local_store.os.fsync(handle.fileno())
    except FileExistsError:
        return False
    local_store._sync_folder(file.parent)
    return True


def put_first(writer: ShardWriter, shard: Any, data: bytes, aligned: Any) -> bytes:
    from pipeline.storage.names import data_name

    writer.store.put(data_name(writer.plan, shard.index), data)
    return data


_created: dict[str, bytes] = {}


def promise_first(writer: ShardWriter, shard: Any, data: bytes, aligned: Any) -> bytes:
    _created[shard.index] = data
    return data


def create_record_first(writer: ShardWriter, record: Any) -> Any:
    from pipeline.storage.names import data_name

    found = _create_record(writer, record)
    writer.store.create(data_name(writer.plan, record.shard), _created[record.shard])
    return found


_create_record = ShardWriter._create_record


def take_any_record(writer: ShardWriter, record: Any) -> Any:
    from pipeline.storage.names import commit_name

    name = commit_name(writer.plan, record.shard)
    if not writer.store.create(name, record.to_json()):
        return writer.read_record(name, writer.store.read(name) or b"")
    return record


def finish_anyhow(run: Run, extra: Any = None) -> None:
    from pipeline.storage import run as module

    records = run.committed()
    status = run.status(records)
    manifest = module.render_manifest(run.plan, records, status.errors, status.recoveries, {})
    run.store.put(module.MANIFEST, manifest)
    run.store.put(module.CARD, module.render_card(run.plan, records, status.errors))
    run.store.put(module.LOADING_FILE, module.render_loading(run.plan))
    run.store.put(module.SUCCESS, run._success)


def ignore_failed_shards(stream: Any, todo: Any, line: Any, limit: Any) -> None:
    for outcome in stream.decode(todo):
        if outcome.error is None:
            line.shard_done()


def never_lost(guard: PositionGuard, at: Position) -> bool:
    return guard._held.get(at.group) == at


def never_repeated(guard: PositionGuard, at: Position) -> bool:
    held = guard._held.get(at.group)
    return False if held == at else _is_at(guard, at)


_is_at = PositionGuard.is_at


def get_without_limit(host: RayHost, message: str, reference: Any, timeout_s: float, *, wait: str = "") -> Any:
    return _get(host, message, reference, None, wait=wait)  # type: ignore[arg-type]


_get = RayHost._get


def count_failed_as_aligned(writer: ShardWriter, *args: Any) -> Any:
    from dataclasses import replace

    record = _describe(writer, *args)
    return replace(record, rows=record.rows + record.failed)


_describe = ShardWriter.describe


def swallow(engine: Any, group: Any, error: HostError) -> None:
    """Go on as if nothing had happened."""


def forget_rows(slots: Any, groups: Any = None) -> list[Any]:
    rows: list[Any] = []
    for group in slots._groups if groups is None else groups:
        rows += group.take_back(keeps_tokens=False)
    return rows


def wait_for_the_end(check: Any) -> None:
    check.ended.wait()


MUTANTS: dict[str, dict[str, Any]] = {
    "commits are not create-only": {
        "pipeline.storage.run.check_exclusive": lambda store: None,
        f"{LOCAL}.LocalStore.create": create_over,
        f"{OBJECTS}.ObjectStore.create": create_over,
    },
    "hashes are not compared": {f"{FILES}._compare": lambda *_: None, f"{FILES}._create_record": take_any_record},
    "files are not synced": {"simulation.disk.Disk.sync": sync_folders_alone},
    "folders are not synced": {f"{LOCAL}._sync_folder": lambda folder: None},
    "files are written in place": {f"{LOCAL}.LocalStore._create_once": write_in_place},
    "two drivers write one shard": {f"{FILES}._write_first": put_first},
    "the commit comes before its data": {
        f"{FILES}._write_first": promise_first,
        f"{FILES}._create_record": create_record_first,
    },
    "the manifest comes before the last commit": {
        "pipeline.storage.run.Run.finish": finish_anyhow,
        "pipeline.stages.relabel._decode": ignore_failed_shards,
    },
    "failed rows count as aligned": {f"{FILES}.describe": count_failed_as_aligned},
    "stores that overwrite are not refused": {"pipeline.storage.run.check_exclusive": lambda store: None},
    "retries are without bound": {
        "pipeline.stores.retries.stop_after_attempt": lambda tries: stop_never,
        "pipeline.stores.retries.stop_after_delay": lambda seconds: stop_never,
    },
    "answers are waited for without limit": {"pipeline.cluster.host_actors.RayHost._get": get_without_limit},
    "the stall watch never fires": {"pipeline.monitoring.stall._StallCheck.run": wait_for_the_end},
    "a host that lost its state goes on": {f"{GUARD}.is_at": never_lost, f"{GUARD}.check": lambda *_: None},
    "a lost state is not told to the engine": {"pipeline.engine.engine.Engine._rebuild": swallow},
    "rows of a failed host are forgotten": {"pipeline.engine.scheduler.Slots.take_back": forget_rows},
    "a repeated call is computed twice": {f"{GUARD}.is_at": never_repeated},
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Production code with the fault of this name, for the block."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for place, wrong in MUTANTS[name].items():
            parent, _, last = place.rpartition(".")
            where = _find(parent)
            before.append((where, last, vars(where)[last]))
            setattr(where, last, wrong)
        yield
    finally:
        for where, last, value in reversed(before):
            setattr(where, last, value)


def _find(place: str) -> Any:
    parent, _, last = place.rpartition(".")
    if last.lstrip("_")[:1].isupper():
        return getattr(importlib.import_module(parent), last)
    return importlib.import_module(place)
