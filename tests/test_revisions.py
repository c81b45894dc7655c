"""Revisions of shards: killed at any write or made twice, each row is there once, and nothing is overwritten."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.storage import DyingStore, Killed, answer, small_plan, tree_bytes

from pipeline.storage.plan import Plan
from pipeline.storage.revisions import Rerun
from pipeline.storage.run import Run
from pipeline.storage.shard_files import ShardWriter
from pipeline.storage.tables import failed_schema, to_table
from pipeline.stores.store import open_store

FAILS = "prompts.jsonl:2"


def begun(folder: Path, name: str = "run", *, is_finished: bool = True) -> Run:
    """A run of three shards in which one row failed, and another is to be mended."""
    run = Run.create_or_resume(open_store(str(folder / name)), small_plan(folder))
    for shard in run.plan.shards:
        rows = list(run.plan.read_shard(shard))
        run.commit(shard, [answer(row, error="bad" if row.row_id == FAILS else None) for row in rows])
    if is_finished:
        run.finish()
    return run


def rerun(plan: Plan, *row_ids: str, text: str = "mended", fails: bool = False) -> Rerun:
    """New answers to rows of the first shard."""
    schema = ShardWriter(None, plan).schema(0)  # type: ignore[arg-type]
    rows = [row for row in plan.read_shard(0) if row.row_id in row_ids]
    records = [answer(row, text=text, error="again" if fails else None) for row in rows]
    answers = None if fails else to_table(records, schema)
    failed = to_table(records, failed_schema(schema)) if fails else None
    return Rerun(answers, failed, {row_id: row_id for row_id in row_ids})


def read(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def revise(run: Run, *row_ids: str, **options: Any) -> None:
    run.reopen()
    run.revise(run.committed()[0], rerun(run.plan, *row_ids, **options))
    run.finish()


def test_a_revision_has_the_rows_in_the_order_of_the_input(tmp_path: Path) -> None:
    run = begun(tmp_path)
    revise(run, FAILS, "prompts.jsonl:3")
    rows = read(tmp_path / "run")
    assert [row["row_id"] for row in rows] == [f"prompts.jsonl:{at}" for at in range(1, 8)]
    assert [row["response"] == "mended" for row in rows[:3]] == [False, True, True]
    assert not list((tmp_path / "run/_failed").iterdir())
    record = run.committed()[0]
    assert (record.rows, record.failed, record.revision, record.reruns, record.failed_at) == (3, 0, 1, 2, [])


def test_a_row_that_fails_in_a_revision_keeps_its_place(tmp_path: Path) -> None:
    run = begun(tmp_path)
    revise(run, "prompts.jsonl:1", fails=True)
    assert run.committed()[0].failed_at == [0, 1]
    revise(run, "prompts.jsonl:1", FAILS)
    assert [row["row_id"] for row in read(tmp_path / "run")][:3] == [f"prompts.jsonl:{at}" for at in (1, 2, 3)]


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("dies_at", range(1, 17))
def test_killed_at_any_write_and_repeated_the_files_are_the_same(
    tmp_path: Path, dies_at: int, is_after: bool
) -> None:
    whole = begun(tmp_path, "whole")
    before = read(tmp_path / "whole")
    revise(whole, FAILS, "prompts.jsonl:3")
    killed = begun(tmp_path, "killed")
    dying: Any = DyingStore(killed.store, dies_at, is_after)
    try:
        revise(Run(dying, killed.plan), FAILS, "prompts.jsonl:3")
    except Killed:
        pass
    else:
        assert dying.num_writes < dies_at
    folder = tmp_path / "killed"
    assert max(Counter(row["row_id"] for row in read(folder)).values()) == 1
    resumed = Run.open(str(folder))
    if resumed.is_complete:
        assert read(folder) in (before, read(tmp_path / "whole"))
    if resumed.committed()[0].revision == 0:
        revise(resumed, FAILS, "prompts.jsonl:3")
    resumed.finish()
    assert tree_bytes(folder) == tree_bytes(tmp_path / "whole")
    assert whole.is_complete
    assert resumed.is_complete


def test_two_commands_that_revise_a_shard_at_once_make_two_revisions(tmp_path: Path) -> None:
    run = begun(tmp_path)
    record = run.committed()[0]
    run.revise(record, rerun(run.plan, FAILS))
    run.revise(record, rerun(run.plan, FAILS))  # the same once more
    run.revise(record, rerun(run.plan, "prompts.jsonl:3", text="of the other"))
    run.finish()
    assert [row["response"] for row in read(tmp_path / "run")][1:3] == ["mended", "of the other"]
    assert (run.committed()[0].revision, run.committed()[0].reruns) == (2, 2)
    assert len(list((tmp_path / "run/_superseded").glob("part-*"))) == 2


def test_a_late_attempt_at_a_revised_shard_brings_nothing_back(tmp_path: Path) -> None:
    run = begun(tmp_path, is_finished=False)
    early = read(tmp_path / "run")
    old = (tmp_path / "run/part-00000-of-00003.parquet").read_bytes()
    run.revise(run.committed()[0], rerun(run.plan, FAILS))
    after = read(tmp_path / "run")
    rows = list(run.plan.read_shard(0))
    record = run.commit(0, [answer(row, error="bad" if row.row_id == FAILS else None) for row in rows])
    assert record.revision == 1
    assert read(tmp_path / "run") == after != early
    (tmp_path / "run/part-00000-of-00003.parquet").write_bytes(old)  # between its look and its write
    run.finish()
    assert read(tmp_path / "run") == after


def test_an_unfinished_run_can_be_mended_and_then_finished(tmp_path: Path) -> None:
    run = Run.create_or_resume(open_store(str(tmp_path / "run")), small_plan(tmp_path))
    run.commit(0, [answer(row, error="bad") for row in run.plan.read_shard(0)])
    run.revise(run.committed()[0], rerun(run.plan, *(row.row_id for row in run.plan.read_shard(0))))
    assert [shard.index for shard in run.pending()] == [1, 2]
    for shard in run.pending():
        run.commit(shard, [answer(row) for row in run.plan.read_shard(shard)])
    run.finish()
    assert (run.status().rows_aligned, run.status().rows_failed) == (7, 0)
