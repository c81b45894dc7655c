"""What stores and runs promise when machines lose their power, listings are behind and stores overwrite."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.storage import answer, small_plan

from pipeline.errors import CageError, ConfigurationError, HostError
from pipeline.runtime import local_hosts
from pipeline.storage.run import Run
from pipeline.stores import local_store
from pipeline.stores.store import LocalStore, Store, open_store


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are synced, in order."""
    found: list[Path] = []
    plain = local_store._sync_folder

    def sync(folder: Path) -> None:
        found.append(folder)
        plain(folder)

    monkeypatch.setattr(local_store, "_sync_folder", sync)
    return found


def test_the_names_of_all_new_folders_survive_a_power_cut(tmp_path: Path, synced: list[Path]) -> None:
    store = LocalStore(tmp_path / "new/run")
    store.put("_commits/a.json", b"x")
    assert {tmp_path, tmp_path / "new", tmp_path / "new/run", tmp_path / "new/run/_commits"} <= set(synced)
    synced.clear()
    store.put("_commits/b.json", b"x")
    assert synced == [tmp_path / "new/run/_commits"]


def test_folders_that_another_process_made_are_synced_by_this_one(tmp_path: Path, synced: list[Path]) -> None:
    (tmp_path / "new/run").mkdir(parents=True)  # by one that was killed before it synced them
    LocalStore(tmp_path / "new/run").put("a.json", b"x")
    assert {tmp_path, tmp_path / "new", tmp_path / "new/run"} <= set(synced)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_above_that_may_not_be_read_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "closed/mine").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o311)
    try:
        LocalStore(tmp_path / "closed/mine/run").put("a.json", b"x")
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_a_file_that_another_process_created_is_durable_before_it_is_relied_on(
    tmp_path: Path, synced: list[Path]
) -> None:
    store = LocalStore(tmp_path / "run")
    store.create("a.json", b"x")
    synced.clear()
    assert not store.create("a.json", b"x")
    assert synced == [tmp_path / "run"]


def test_records_whose_writer_died_before_it_synced_them_are_durable_before_a_run_counts_as_complete(
    tmp_path: Path, synced: list[Path]
) -> None:
    plan = small_plan(tmp_path)
    run = Run.create_or_resume(LocalStore(tmp_path / "run"), plan)
    for shard in plan.shards:
        run.commit(shard, [answer(row) for row in plan.read_shard(shard)])
    before_the_manifest: list[set[Path]] = []

    class Noting(Changed):
        def put(self, name: str, data: bytes) -> None:
            before_the_manifest.append(set(synced))
            self.store.put(name, data)

    synced.clear()
    Run.open(str(tmp_path / "run"), open_store=lambda path: Noting(open_store(path))).finish()
    assert {tmp_path / "run", tmp_path / "run/_commits"} <= before_the_manifest[0]


@pytest.mark.parametrize("method", ["create", "put"])
def test_a_temporary_file_that_is_swept_away_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    swept: list[Path] = []
    plain = local_store.os.fsync

    def sweep(descriptor: int) -> None:
        plain(descriptor)
        if not swept:
            swept.extend((tmp_path / "run").glob(".*.tmp"))
            for temporary in swept:
                temporary.unlink()

    monkeypatch.setattr(local_store.os, "fsync", sweep)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    (tmp_path / "run").mkdir()
    local_store._durable_folders.add(tmp_path / "run")  # its folder is not synced first
    getattr(LocalStore(tmp_path / "run"), method)("a.json", b"x")
    assert len(swept) == 1
    assert (tmp_path / "run/a.json").read_bytes() == b"x"


@dataclass(frozen=True)
class Changed:
    """A store with some methods changed."""

    store: Store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class Overwriting(Changed):
    """Lets every writer win."""

    def create(self, name: str, data: bytes) -> bool:
        self.store.put(name, data)
        return True


class Behind(Changed):
    """Whose listings are behind: they show nothing."""

    def names(self, prefix: str = "") -> list[str]:
        return []


def test_a_store_that_overwrites_is_refused_by_every_command(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    store: Any = Overwriting(open_store(str(tmp_path / "run")))
    for _ in range(2):  # the first one leaves its plan
        with pytest.raises(ConfigurationError, match="without create-only writes"):
            Run.create_or_resume(store, plan).begin()
    assert store.names() == ["_plan.json"]


def test_a_run_whose_listings_are_behind_is_finished(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    store: Any = Behind(open_store(str(tmp_path / "run")))
    run = Run.create_or_resume(store, plan)
    for shard in plan.shards[:-1]:
        run.commit(shard, [answer(row) for row in plan.read_shard(shard)])
    with pytest.raises(CageError, match="is not complete: 1 shards and 0 files missing"):
        run.finish()
    run.commit(plan.shards[-1], [answer(row) for row in plan.read_shard(plan.shards[-1])])
    (tmp_path / "run" / "part-00000-of-00003.parquet").rename(tmp_path / "away")
    with pytest.raises(CageError, match="is not complete: 0 shards and 1 files missing"):
        run.finish()
    (tmp_path / "away").rename(tmp_path / "run" / "part-00000-of-00003.parquet")
    run.finish()
    assert Run.open(str(tmp_path / "run")).status().rows_aligned == plan.num_rows


def test_a_host_that_cannot_be_started_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.decoding import config_of, engine_of

    def start(*_: object) -> None:
        raise MemoryError("can't allocate memory")

    monkeypatch.setattr(local_hosts, "start_sampling", start)
    with pytest.raises(HostError, match=r"host base \(.*\) failed in load: MemoryError: can't allocate memory"):
        engine_of(config_of(tiny()))
