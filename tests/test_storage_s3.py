"""The same promises on S3: input, output, commits, races and resume against a server on loopback."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import multiprocessing
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.storage import MODELS, answer, make_config, s3_server, small_plan, tree_bytes, write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError, RunMismatch
from pipeline.inputs.source import open_input
from pipeline.storage.plan import Plan, make_plan
from pipeline.storage.run import Run
from pipeline.stores.store import Store, open_store

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    import s3fs

    with s3_server():
        files = s3fs.S3FileSystem(use_listings_cache=False)
        files.mkdir("s3://runs")
        yield files


@pytest.fixture
def folder() -> str:
    return f"s3://runs/{uuid.uuid4().hex}"


def commit_all(run: Run, *, attempt: int = 1) -> None:
    for shard in run.pending():
        rows = list(run.plan.read_shard(shard))
        run.commit(shard, [answer(row) for row in rows], attempt=attempt, row_ids=[row.row_id for row in rows])


def upload(s3: Any, source: Path, target: str) -> None:
    s3.pipe_file(target, source.read_bytes())


def test_a_run_on_s3_has_the_files_of_a_local_one(s3: Any, folder: str, tmp_path: Path) -> None:
    records = [{"prompt": "a"}, b"\xff", {"prompt": None}, *({"prompt": f"q{index}"} for index in range(8))]
    local = write_jsonl(tmp_path / "x.jsonl", records)
    upload(s3, local, f"{folder}/in/x.jsonl")
    here = make_plan(make_config(local, tmp_path / "run"), MODELS)
    there = make_plan(make_config(f"{folder}/in/x.jsonl", f"{folder}/run"), MODELS)
    assert here.digest == there.digest
    for plan in (here, there):
        run = Run.create_or_resume(open_store(plan.config["output"]["path"]), plan)
        commit_all(run)
        run.finish()
    opened = Run.open(f"{folder}/run")
    assert opened.is_complete
    assert opened.status().rows_failed == 2
    stored = {name: opened.store.read(name) for name in opened.store.names() if name.endswith(".parquet")}
    assert stored == tree_bytes(tmp_path / "run")
    assert opened.find("x.jsonl:5")[0]["response"] == "answer to x.jsonl:5 (0)"
    assert opened.find("x.jsonl:2")[0]["error"] == "line 2 of x.jsonl is not valid UTF-8"


def test_parquet_and_folders_are_read_from_s3(s3: Any, folder: str, tmp_path: Path) -> None:
    prompts = [f"q{index}" for index in range(50)]
    pq.write_table(pa.table({"prompt": prompts, "key": list(range(50))}), tmp_path / "a.parquet", row_group_size=10)
    upload(s3, tmp_path / "a.parquet", f"{folder}/a.parquet")
    upload(s3, write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "key": 50}]), f"{folder}/b.jsonl")
    upload(s3, write_jsonl(tmp_path / "c.jsonl", [{"prompt": "hidden", "key": 0}]), f"{folder}/_c.jsonl")
    s3.pipe_file(f"{folder}/below/d.jsonl", b'{"prompt": "below"}')
    source = open_input(InputConfig(path=folder, id="key"))
    assert [file.name for file in source.files] == ["a.parquet", "b.jsonl"]
    assert [row.row_id for row in source.read_rows(0, 23, 26)] == ["23", "24", "25"]
    assert [row.messages[0]["content"] for row in source] == [*prompts, "x"]
    pq.write_table(pa.table({"prompt": ["other"] * 50, "key": list(range(50))}), tmp_path / "a.parquet")
    upload(s3, tmp_path / "a.parquet", f"{folder}/a.parquet")
    assert open_input(InputConfig(path=folder, id="key")).files[0].identity != source.files[0].identity


def as_zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": as_zstd}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_text_is_read_from_s3_from_any_mark(s3: Any, folder: str, suffix: str) -> None:
    lines = b"".join(json.dumps({"prompt": f"q{index}", "key": index}).encode() + b"\n" for index in range(40))
    s3.pipe_file(f"{folder}/x.jsonl{suffix}", COMPRESSIONS[suffix](lines))
    for path in (folder, f"{folder}/x.jsonl{suffix}"):
        source = open_input(InputConfig(path=path, id="key"), stride=10)
        assert [row.row_id for row in source] == [str(index) for index in range(40)]
        assert [row.row_id for row in source.read_rows(0, 25, 28)] == ["25", "26", "27"]


def test_patterns_match_objects(s3: Any, folder: str) -> None:
    hidden = (".tmp/a-3.jsonl", "deep/_old/a-4.jsonl")
    for name in ("a-0.jsonl", "a-1.jsonl.gz", "b.jsonl", "deep/er/a-2.jsonl", "notes.txt", *hidden):
        data = json.dumps({"prompt": name}).encode()
        s3.pipe_file(f"{folder}/{name}", gzip.compress(data) if name.endswith(".gz") else data)

    def names(pattern: str) -> list[str]:
        source = open_input(InputConfig(path=f"{folder}/{pattern}"))
        assert [row.messages[0]["content"].rpartition("/")[2] for row in source] == [
            file.name.rpartition("/")[2] for file in source.files
        ]
        return [file.name for file in source.files]

    assert names("a-*.jsonl*") == ["a-0.jsonl", "a-1.jsonl.gz"]
    assert names("*.jsonl") == ["a-0.jsonl", "b.jsonl"]
    assert names("[ab].jsonl") == ["b.jsonl"]
    assert names("**/*.jsonl") == ["a-0.jsonl", "b.jsonl", "deep/er/a-2.jsonl"]
    assert names("deep/*/a-?.jsonl") == ["er/a-2.jsonl"]
    assert names("deep/_*/a-?.jsonl") == ["_old/a-4.jsonl"]
    with pytest.raises(ConfigurationError, match=r"input\.path: no file matches s3://"):
        names("c*.jsonl")


def test_a_data_set_of_save_to_disk_is_read_from_s3(s3: Any, folder: str, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"prompt": f"q{index}"} for index in range(9)]).shuffle(seed=1)
    splits = datasets.DatasetDict({"train": data, "test": data.select([3])})
    splits.save_to_disk(str(tmp_path / "all"), num_shards={"train": 3, "test": 1})
    s3.put(str(tmp_path / "all"), f"{folder}/all", recursive=True)
    for path, fields, expected in (
        (f"{folder}/all", {}, list(data["prompt"])),
        (f"{folder}/all", {"split": "test"}, [data["prompt"][3]]),
        (f"{folder}/all/train", {}, list(data["prompt"])),
    ):
        source = open_input(InputConfig(path=path, **fields))
        assert [row.messages[0]["content"] for row in source] == expected
    with pytest.raises(ConfigurationError, match=r"has no split 'dev'; splits: test, train"):
        open_input(InputConfig(path=f"{folder}/all", split="dev"))
    with pytest.raises(ConfigurationError, match=r"input\.subset has no effect on s3://"):
        open_input(InputConfig(path=f"{folder}/all", subset="x"))


def test_the_middle_of_a_large_object_is_read_without_its_beginning(s3: Any, folder: str, tmp_path: Path) -> None:
    """The first 20 MB are replaced by other bytes of the same number: only a reader of them would notice."""
    path = write_jsonl(tmp_path / "x.jsonl", ({"prompt": f"{index:>2000}"} for index in range(20_000)))
    upload(s3, path, f"{folder}/x.jsonl")
    source = open_input(InputConfig(path=f"{folder}/x.jsonl"), stride=100)
    data = path.read_bytes()
    s3.pipe_file(f"{folder}/x.jsonl", b"\xff" * 20_000_000 + data[20_000_000:], chunksize=2**30)
    rows = list(source.read_rows(0, 15_000, 15_010))
    assert [row.row_id for row in rows] == [f"x.jsonl:{line}" for line in range(15_001, 15_011)]
    assert all(row.error is None for row in rows)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("s3://runs/nothing-here", "there is no file or folder 's3://runs/nothing-here'"),
        ("s3://no-such-bucket/x.jsonl", "there is no file or folder 's3://no-such-bucket/x.jsonl'"),
        ("s3://runs/empty", "no input file in the folder s3://runs/empty"),
    ],
)
def test_a_missing_input_on_s3_is_reported(s3: Any, path: str, why: str) -> None:
    s3.pipe_file("s3://runs/empty/readme.txt", b"x")
    with pytest.raises(ConfigurationError, match=why):
        open_input(InputConfig(path=path))


def test_another_fingerprint_is_refused_on_s3(s3: Any, folder: str, tmp_path: Path) -> None:
    Run.create_or_resume(open_store(folder), small_plan(tmp_path, folder))
    assert Run.create_or_resume(open_store(folder), small_plan(tmp_path, folder)).committed() == {}
    with pytest.raises(RunMismatch, match=r"decoding\.seed: 0 -> 1"):
        Run.create_or_resume(open_store(folder), small_plan(tmp_path, folder, decoding={"seed": 1}))


def drive(store: Store, plan: Plan, barrier: Any) -> None:
    barrier.wait(60)
    run = Run.create_or_resume(store, plan)
    for shard in plan.shards:  # every shard is raced for
        rows = list(plan.read_shard(shard))
        run.commit(shard, [answer(row) for row in rows], attempt=1)
    run.finish()


def test_two_racing_drivers_on_s3_write_each_shard_once(s3: Any, folder: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, folder, num_rows=18)
    store, barrier = open_store(folder), SPAWN.Barrier(2)
    drivers = [SPAWN.Process(target=drive, args=(store, plan, barrier)) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(90)
        assert driver.exitcode == 0
    run = Run.open(folder)
    assert run.is_complete
    assert len(run.committed()) == len(store.names("part-")) == 6
    names = [f"prompts.jsonl:{line}" for line in range(1, 19)]
    assert [run.find(name)[0]["row_id"] for name in names[::7]] == names[::7]


def test_a_run_killed_on_s3_is_resumed(s3: Any, folder: str, tmp_path: Path) -> None:
    plan = small_plan(tmp_path, folder, num_rows=30)
    store, barrier = open_store(folder), SPAWN.Barrier(1)
    driver = SPAWN.Process(target=drive, args=(store, plan, barrier))
    driver.start()
    while driver.is_alive() and len(store.names("_commits/")) < 2:
        time.sleep(0.01)
    driver.kill()
    driver.join(10)
    run = Run.create_or_resume(store, plan)
    assert len(run.committed()) >= 2
    commit_all(run, attempt=2)
    run.finish()
    commit_all(whole := Run.create_or_resume(open_store(str(tmp_path / "whole")), plan))
    assert whole.plan.digest == run.plan.digest
    stored = {name: store.read(name) for name in store.names("part-")}
    assert stored == tree_bytes(tmp_path / "whole")
