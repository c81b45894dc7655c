"""Several drivers on one run directory, killed at any time: no row is lost or repeated, no file differs."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from support.storage import DyingStore, Killed, answer, make_config, small_plan, tree_bytes

from pipeline.errors import NondeterminismError, StorageError
from pipeline.storage.extension import extend_plan
from pipeline.storage.plan import Plan
from pipeline.storage.run import Run
from pipeline.stores.store import Store, open_store

SPAWN = multiprocessing.get_context("spawn")


def work(store: Store, plan: Plan, seed: int, finishes: bool) -> None:
    """Drive a run: every shard that is not committed, in an order of its own."""
    run = Run.create_or_resume(store, plan)
    shards = list(plan.shards)
    random.Random(seed).shuffle(shards)
    for shard in shards:
        if shard in run.pending():
            rows = list(plan.read_shard(shard))
            errors = [f"row {row.row_id} is bad" if hash_of(row.row_id) % 5 == 0 else None for row in rows]
            records = [answer(row, error=error) for row, error in zip(rows, errors, strict=True)]
            run.commit(shard, records, attempt=seed)
    if finishes:
        run.finish()


def hash_of(text: str) -> int:
    return sum(text.encode())


def start(store: Store, plan: Plan, seed: int, *, finishes: bool = True) -> BaseProcess:
    driver = SPAWN.Process(target=work, args=(store, plan, seed, finishes))
    driver.start()
    return driver


def test_drivers_side_by_side_write_the_files_of_one(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, num_rows=36)
    work(open_store(str(tmp_path / "one")), plan, 0, True)
    together = open_store(str(tmp_path / "together"))
    drivers = [start(together, plan, seed) for seed in (1, 2, 3)]
    for driver in drivers:
        driver.join(60)
        assert driver.exitcode == 0
    assert tree_bytes(tmp_path / "together") == tree_bytes(tmp_path / "one")
    run = Run.open(together.path)
    assert run.is_complete
    assert len(run.committed()) == 12
    assert [each.name for each in (tmp_path / "together").rglob(".*")] == [".huggingface.yaml"]


@pytest.mark.slow
def test_drivers_killed_at_random_times_lose_and_repeat_nothing(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, num_rows=90)
    work(open_store(str(tmp_path / "one")), plan, 0, True)
    store = open_store(str(tmp_path / "killed"))
    chance = random.Random(7)
    for seed in range(2):
        drivers = [start(store, plan, seed * 10 + each) for each in (1, 2)]
        before = len(store.names("_commits/"))
        while len(store.names("_commits/")) == before and all(driver.is_alive() for driver in drivers):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        for driver in drivers:
            driver.kill()
            driver.join(10)
    work(store, plan, 99, True)
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "one")


def test_drivers_with_other_answers_are_an_alarm_for_all_but_one(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    store = open_store(str(tmp_path / "run"))
    first, second = Run.create_or_resume(store, plan), Run.create_or_resume(store, plan)
    rows = list(plan.read_shard(0))
    kept = first.commit(0, [answer(row, text="first") for row in rows])
    with pytest.raises(NondeterminismError):
        second.commit(0, [answer(row, text="second") for row in rows])
    assert second.committed() == {0: kept}
    assert {row["response"] for name in rows for row in second.find(name.row_id)} == {"first"}


def grow(folder: Path, num_rows: int) -> Plan:
    """The plan of the same run over more rows of the same file."""
    return small_plan(folder, num_rows=num_rows)


def extend(store: Store, folder: Path, fresh: Plan) -> Run:
    run = Run.open(store.path)
    config = make_config(folder / "prompts.jsonl", folder / "run")
    return run.extend(extend_plan(store.path, run.plan, fresh, config))


def test_a_driver_whose_run_is_extended_goes_on_and_leaves_the_end_to_the_other(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, num_rows=7)
    store = open_store(str(tmp_path / "run"))
    old = Run.create_or_resume(store, plan)
    old.commit(0, [answer(row) for row in plan.read_shard(0)])
    new = extend(store, tmp_path, grow(tmp_path, 12))
    for shard in (4, 1):  # a new one, and one that both have
        new.commit(shard, [answer(row, error="bad" if shard == 4 else None) for row in new.plan.read_shard(shard)])
    assert list(old.committed()) == [0, 1]
    for shard in old.pending():
        old.commit(shard, [answer(row) for row in old.plan.read_shard(shard)])
    old.finish()
    assert not (tmp_path / "run/_SUCCESS").exists()
    assert [shard.index for shard in new.pending()] == [3]
    new.commit(3, [answer(row) for row in new.plan.read_shard(3)])
    new.finish()
    assert Run.open(store.path).is_complete
    assert not old.is_complete
    status = new.status()
    assert (status.rows_aligned, status.rows_failed, status.prompts) == (10, 2, (7, 12))
    assert sorted(tree_bytes(tmp_path / "run", "part-*")) == [
        f"part-{shard:05d}-of-{3 if shard < 3 else 5:05d}.parquet" for shard in range(5)
    ]


def test_two_commands_that_extend_a_run_at_once_agree_or_one_says_so(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    Run.create_or_resume(store, small_plan(tmp_path))
    run = Run.open(store.path)
    config = make_config(tmp_path / "prompts.jsonl", tmp_path / "run")
    same = [extend_plan(store.path, run.plan, grow(tmp_path, 9), config) for _ in range(2)]
    other = extend_plan(store.path, run.plan, grow(tmp_path, 11), config)
    assert run.extend(same[0]) == run.extend(same[1])
    with pytest.raises(StorageError, match="another command has extended"):
        run.extend(other)
    assert extend(store, tmp_path, grow(tmp_path, 11)).plan.revision == 2


@pytest.mark.parametrize("dies_at", ["before the plan", "after the plan"])
def test_an_extension_that_is_killed_is_there_or_not(tmp_path: Path, dies_at: str) -> None:
    store = open_store(str(tmp_path / "run"))
    work(store, small_plan(tmp_path), 0, True)
    fresh = grow(tmp_path, 12)
    dying: Any = DyingStore(store, 1, is_after=dies_at == "after the plan")
    run = Run.open(store.path)
    plan = extend_plan(store.path, run.plan, fresh, make_config(tmp_path / "prompts.jsonl", tmp_path / "run"))
    with pytest.raises(Killed):
        Run(dying, run.plan).extend(plan)
    opened = Run.open(store.path)
    assert opened.plan.revision == int(dies_at == "after the plan")
    assert opened.is_complete == (dies_at == "before the plan")
    again = opened if opened.plan.revision else opened.extend(plan)
    again.begin()
    assert not (tmp_path / "run/_SUCCESS").exists()  # which would be of the shards before
    for shard in again.pending():
        again.commit(shard, [answer(row) for row in again.plan.read_shard(shard)])
    again.finish()
    assert (again.is_complete, again.status().rows_aligned + again.status().rows_failed) == (True, 12)
