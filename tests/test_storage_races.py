"""Several drivers on one run directory, killed at any time: no row is lost or repeated, no file differs."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from support.storage import answer, small_plan, tree_bytes

from pipeline.errors import NondeterminismError
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
