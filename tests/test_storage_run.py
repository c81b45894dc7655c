"""A run directory: each row exactly once, whatever order, attempt or driver wrote it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import yaml
from support.storage import DyingStore, Killed, answer, make_config, small_plan, tree_bytes, write_jsonl

from pipeline.errors import CageError, ConfigurationError, NondeterminismError, StorageError
from pipeline.monitoring.reasons import failures_of
from pipeline.records import Record
from pipeline.storage.commits import CommitRecord, sha256
from pipeline.storage.failed_rows import failed_of
from pipeline.storage.names import commit_name
from pipeline.storage.plan import Plan, make_plan
from pipeline.storage.run import Run
from pipeline.storage.tables import write_table_bytes
from pipeline.stores.store import LocalStore, open_store

MIXED = [
    {"prompt": "a"},
    {"prompt": None},
    b"\xff",
    {"prompt": "b"},
    {"prompt": "c"},
    {"prompt": "d"},
    {"prompt": "e"},
]


def records_of(plan: Plan, shard: int, **fields: Any) -> list[Record]:
    rows = plan.read_shard(shard)
    return [
        answer(row, sample=sample, **fields) for row in rows for sample in range(1 if row.error else plan.num_samples)
    ]


def new_run(folder: Path, run: str | Path | None = None, **sections: Any) -> Run:
    plan = small_plan(folder, run, **sections)
    return Run.create_or_resume(open_store(plan.config["output"]["path"]), plan)


def mixed_run(folder: Path, name: str = "run") -> Run:
    path = write_jsonl(folder / "mixed.jsonl", MIXED)
    plan = make_plan(make_config(path, folder / name), {"base": "tiny@abc123"})
    return Run.create_or_resume(open_store(str(folder / name)), plan)


def finished(run: Run) -> Run:
    for shard in run.plan.shards:
        run.commit(shard, records_of(run.plan, shard.index))
    run.finish()
    return run


def test_each_row_is_in_one_file_once(tmp_path: Path) -> None:
    run = finished(mixed_run(tmp_path))
    aligned = [row for _, data in sorted(tree_bytes(tmp_path / "run", "part-*").items()) for row in read(data)]
    failed = [row for data in tree_bytes(tmp_path / "run" / "_failed").values() for row in read(data)]
    assert [row["row_id"] for row in aligned] == [f"mixed.jsonl:{line}" for line in (1, 4, 5, 6, 7)]
    assert [(row["row_id"], row["error"]) for row in failed] == [
        ("mixed.jsonl:2", "line 2 of mixed.jsonl: prompt is null"),
        ("mixed.jsonl:3", "line 3 of mixed.jsonl is not valid UTF-8"),
    ]
    assert all(row["error"] is None for row in aligned)
    assert run.status().errors == {"prompt is null": 1, "is not valid UTF-8": 1}


def read(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(data)).to_pylist()
    return rows


def test_files_do_not_depend_on_order_attempt_time_or_host(tmp_path: Path) -> None:
    sections = {"decoding": {"n": 3}}
    plain = finished(new_run(tmp_path, tmp_path / "plain", **sections))
    other = new_run(tmp_path, tmp_path / "other", **sections)
    shards = list(other.plan.shards)
    random.Random(0).shuffle(shards)
    for shard in shards:
        records = records_of(other.plan, shard.index)
        random.Random(shard.index).shuffle(records)
        other.commit(shard, records, attempt=2, seconds=3.5, host="elsewhere")
    other.finish({"note": "different"})
    assert tree_bytes(tmp_path / "plain") == tree_bytes(tmp_path / "other")
    assert plain.plan.digest == other.plan.digest


def test_a_shard_exists_exactly_if_its_record_exists(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.committed() == {}
    record = run.commit(1, records_of(run.plan, 1), attempt=2, seconds=1.25, host="h")
    assert run.committed() == {1: record}
    assert [shard.index for shard in run.pending()] == [0, 2]
    assert (record.rows, record.failed, record.attempt, record.seconds, record.host) == (3, 0, 2, 1.25, "h")
    (tmp_path / "run" / "part-00000-of-00003.parquet").write_bytes(b"data without a record")
    assert set(run.committed()) == {1}
    assert set(record.sha256_by_file) == {"part-00001-of-00003.parquet"}


def test_committing_again_changes_nothing(tmp_path: Path) -> None:
    run = mixed_run(tmp_path)
    first = run.commit(0, records_of(run.plan, 0), attempt=1)
    before = tree_bytes(tmp_path / "run", "**/*.*")
    assert run.commit(0, records_of(run.plan, 0), attempt=2, seconds=9.0) == first
    assert tree_bytes(tmp_path / "run", "**/*.*") == before


@pytest.mark.parametrize(("failed_before", "failed_now"), [([1], []), ([], [1]), ([0], [1]), ([], [0, 1, 2])])
def test_a_commit_counts_the_answers_of_the_file_that_it_takes_over(
    tmp_path: Path, failed_before: list[int], failed_now: list[int]
) -> None:
    run = new_run(tmp_path)
    shard = run.plan.shards[0]

    def attempt(failed: list[int]) -> CommitRecord:
        rows = list(run.plan.read_shard(0))
        records = [answer(row, error="no host" if at in failed else None) for at, row in enumerate(rows)]
        drafted = [
            dataclasses.replace(each, num_passes=each.num_tokens - 2, values={"kind": (-float(at), float(at))})
            for at, each in enumerate(records)
            if not each.is_failed
        ]
        return run.commit(shard, [*drafted, *(each for each in records if each.is_failed)])

    attempt(failed_before)
    run.store.remove(commit_name(run.plan, 0))  # as if the process had been killed between the two
    found = attempt(failed_now)
    num_rows = shard.num_rows
    in_both = num_rows - len({*failed_before, *failed_now})
    assert (found.rows, found.failed) == (num_rows - len(failed_before), len(failed_before))
    assert found.accepted == 2 * in_both
    assert found.passes == found.tokens - found.accepted
    assert found.values.get("kind", [0])[0] == in_both


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("dies_at", range(1, 13))
def test_killed_at_any_write_and_resumed_the_files_are_the_same(tmp_path: Path, dies_at: int, is_after: bool) -> None:
    whole = finished(mixed_run(tmp_path, "whole"))
    dying: Any = DyingStore(LocalStore(tmp_path / "killed"), dies_at, is_after)
    try:
        finished(Run.create_or_resume(dying, whole.plan))
    except Killed:
        pass
    else:
        assert dying.num_writes < dies_at
    resumed = Run.create_or_resume(LocalStore(tmp_path / "killed"), whole.plan)
    for shard in resumed.pending():
        resumed.commit(shard, records_of(resumed.plan, shard.index), attempt=2)
    resumed.finish()
    assert resumed.is_complete
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")
    assert resumed.status().rows_aligned == 5
    assert [file.name for file in (tmp_path / "killed").rglob(".*")] == [".huggingface.yaml"]


def test_other_values_for_the_same_row_are_an_alarm(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.commit(0, records_of(run.plan, 0))
    before = tree_bytes(tmp_path / "run")
    with pytest.raises(NondeterminismError, match=r"twice with different values: 3 rows, first row 'prompts"):
        run.commit(0, records_of(run.plan, 0, text="other"))
    assert tree_bytes(tmp_path / "run") == before


def test_in_relaxed_mode_the_first_file_is_kept(tmp_path: Path) -> None:
    run = new_run(tmp_path, decoding={"reproducibility": "relaxed"})
    first = run.commit(0, records_of(run.plan, 0))
    assert run.commit(0, records_of(run.plan, 0, text="other")) == first


def test_a_row_that_failed_in_one_attempt_only_is_neither_lost_nor_repeated(tmp_path: Path) -> None:
    """The first attempt dies before its commit record; the second one rejects another row."""
    run = new_run(tmp_path)
    good = records_of(run.plan, 0)
    bad = [answer(row, error="the host died") for row in run.plan.read_shard(0)]
    dying: Any = DyingStore(run.store, 3, is_after=False)
    with pytest.raises(Killed):
        Run(dying, run.plan).commit(0, [bad[0], good[1], good[2]])
    record = run.commit(0, [good[0], good[1], bad[2]])
    assert (record.rows, record.failed) == (2, 1)
    for shard in (1, 2):
        run.commit(shard, records_of(run.plan, shard))
    run.finish()
    stored = [row for data in tree_bytes(tmp_path / "run").values() for row in read(data)]
    assert sorted(row["row_id"] for row in stored) == sorted(row.row_id for row in run.plan.open_input())
    assert [row["row_id"] for row in stored if row["error"]] == [good[0].row_id]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda records: records[1:], "got 1 of 2 samples of row"),
        (lambda records: [*records, records[0]], "sample 0 twice"),
        (lambda records: [dataclasses.replace(records[0], row_id="alien"), *records[1:]], "has no row 'alien'"),
        (lambda records: [dataclasses.replace(records[0], sample=2), *records[1:]], r"has no row .*, sample 2"),
        (lambda records: records[2:], "got 0 of 2 samples of row"),
    ],
)
def test_a_lost_or_repeated_record_is_refused_before_any_write(tmp_path: Path, spoil: Any, why: str) -> None:
    run = new_run(tmp_path, decoding={"n": 2})
    with pytest.raises(CageError, match=why):
        run.commit(0, spoil(records_of(run.plan, 0)))
    assert tree_bytes(tmp_path / "run") == {}


def test_a_run_is_opened_from_its_files_alone(tmp_path: Path) -> None:
    finished(mixed_run(tmp_path))
    (tmp_path / "mixed.jsonl").unlink()
    run = Run.open(str(tmp_path / "run"))
    status = run.status()
    assert (status.num_shards, status.shards_done, status.num_rows) == (3, 3, 7)
    assert (status.rows_aligned, status.rows_failed, status.is_complete) == (5, 2, True)
    assert status.tokens == sum(record.tokens for record in run.committed().values()) > 0


def test_a_run_is_opened_by_the_store_that_the_caller_supplies(tmp_path: Path) -> None:
    run = finished(new_run(tmp_path))
    opened: list[str] = []

    def open_dying(path: str) -> Any:
        opened.append(path)
        return DyingStore(open_store(path), dies_at=1, is_after=False)

    path = str(tmp_path / "run")
    again = Run.open(path, open_store=open_dying)
    assert opened == [path]
    assert again.plan == run.plan
    with pytest.raises(Killed):
        again.finish()


OPEN = """
import sys
from pipeline.config.sections import InputConfig
from pipeline.inputs.source import open_input
from pipeline.storage.run import Run
run = Run.open(sys.argv[1])
assert run.status().is_complete and run.find("prompts.jsonl:3")
assert len(list(open_input(InputConfig(path=sys.argv[2])))) == 7
assert len(list(open_input(InputConfig(path=sys.argv[1], messages="prompt")))) == 7
print([name for name in sys.argv[3:] if name in sys.modules])
"""


def test_a_run_and_its_input_are_read_without_slow_imports(tmp_path: Path) -> None:
    """Each of them takes longer to load than all that is needed to show the state of a run."""
    finished(new_run(tmp_path))
    slow = ["torch", "transformers", "datasets", "ray", "fsspec", "pandas", "pyarrow.compute"]
    command = [sys.executable, "-c", OPEN, str(tmp_path / "run"), str(tmp_path / "prompts.jsonl"), *slow]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_finished_run_is_an_input_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    run = mixed_run(tmp_path)
    run.commit(0, records_of(run.plan, 0))
    config = make_config(tmp_path / "run", tmp_path / "next", input={"messages": "prompt", "id": "row_id"})
    with pytest.raises(ConfigurationError, match="is a run that is not finished"):
        make_plan(config)
    finished(run)
    rows = list(make_plan(config).open_input())
    assert [row.row_id for row in rows] == [f"mixed.jsonl:{line}" for line in (1, 4, 5, 6, 7)]
    assert all(row.error is None for row in rows)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no run in .*: it has no _plan\.json"):
        Run.open(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["part-0.parquet", "README.md", "my notes.txt", "sub/x", "_scores/part-0.parquet"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"someone's")
    with pytest.raises(
        ConfigurationError, match=rf"holds other files and no run: '{name.partition('/')[0]}'; choose"
    ):
        new_run(tmp_path)
    assert tree_bytes(tmp_path / "run", "**/*.*" if "." in name else "**/x") == {name: b"someone's"}


def test_a_folder_as_systems_make_it_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "run/lost+found").mkdir(parents=True)
    (tmp_path / "run/.DS_Store").write_bytes(b"")
    finished(new_run(tmp_path))
    assert Run.open(str(tmp_path / "run")).is_complete


def test_a_run_with_the_earlier_name_of_its_plan_is_read_and_resumed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.commit(0, records_of(run.plan, 0))
    (tmp_path / "run/_plan.json").rename(tmp_path / "run/plan.json")
    assert Run.open(str(tmp_path / "run")).plan == run.plan
    resumed = new_run(tmp_path)
    assert [shard.index for shard in resumed.pending()] == [1, 2]


def test_a_finished_run_is_read_by_its_folder(tmp_path: Path) -> None:
    """Failed rows, scores, reports and training data beside the answers change nothing."""
    run = finished(mixed_run(tmp_path))
    for name in ("_scores/part-0.parquet", "_dataset/README.md", "_report.html", "_metrics.json"):
        run.store.put(name, b"not an answer")
    folder = str(tmp_path / "run")
    expected = [f"mixed.jsonl:{line}" for line in (1, 4, 5, 6, 7)]
    assert pq.read_table(folder).column("row_id").to_pylist() == expected
    assert list(pd.read_parquet(folder)["row_id"]) == expected
    assert pa.dataset.dataset(folder).to_table().column("row_id").to_pylist() == expected
    assert datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path / "hf"))["row_id"] == expected


def test_an_unfinished_run_cannot_be_finished(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.commit(0, records_of(run.plan, 0))
    with pytest.raises(CageError, match="is not complete: 2 shards"):
        run.finish()
    for shard in (1, 2):
        run.commit(shard, records_of(run.plan, shard))
    (tmp_path / "run" / "part-00001-of-00003.parquet").unlink()
    with pytest.raises(CageError, match="1 files missing"):
        run.finish()
    assert not run.is_complete
    run.commit(1, records_of(run.plan, 1))
    run.finish()
    assert run.is_complete


def test_a_damaged_or_foreign_record_is_reported(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    record = run.commit(0, records_of(run.plan, 0))
    stored = tmp_path / "run" / "_commits" / "part-00000.json"
    for damaged in (b"", b"{}", b"\xff", b"[]", stored.read_bytes()[:-20]):
        stored.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"part-00000\.json is not a commit record"):
            run.committed()
    foreign = dataclasses.replace(record, digest="0" * 64)
    stored.write_bytes(foreign.to_json())
    with pytest.raises(StorageError, match="belongs to another run"):
        run.committed()
    assert CommitRecord.from_json(record.to_json(), source="x") == record


def test_a_name_in_a_record_or_footer_cannot_leave_the_directory(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    record = run.commit(0, records_of(run.plan, 0))
    escaped = dataclasses.replace(record, sha256_by_file={"../../etc/passwd": "0"})
    (tmp_path / "run" / "_commits" / "part-00000.json").write_bytes(escaped.to_json())
    with pytest.raises(StorageError, match="a stored name has"):
        run.find("prompts.jsonl:1")


def test_damaged_data_of_another_attempt_is_reported(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (tmp_path / "run" / "part-00000-of-00003.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(StorageError, match=r"part-00000-of-00003\.parquet cannot be read"):
        run.commit(0, records_of(run.plan, 0))


@pytest.mark.parametrize("line", range(1, 8))
def test_a_row_is_found_with_all_its_columns(tmp_path: Path, line: int) -> None:
    run = finished(mixed_run(tmp_path))
    (row,) = run.find(f"mixed.jsonl:{line}")
    assert (row["error"] is None) == (line not in (2, 3))
    assert row["row_id"] == f"mixed.jsonl:{line}"
    assert run.find("mixed.jsonl:9") == []
    assert run.find("") == []


def test_every_sample_of_a_row_is_found(tmp_path: Path) -> None:
    run = new_run(tmp_path, decoding={"n": 3})
    run.commit(0, records_of(run.plan, 0))
    assert [row["sample"] for row in run.find("prompts.jsonl:2")] == [0, 1, 2]
    assert run.find("prompts.jsonl:7") == []


def test_datasets_loads_a_run_by_its_card_and_leaves_failed_rows_out(tmp_path: Path) -> None:
    finished(mixed_run(tmp_path))
    loaded = datasets.load_dataset(str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert loaded["train"]["row_id"][:] == [f"mixed.jsonl:{line}" for line in (1, 4, 5, 6, 7)]


def test_a_shard_whose_rows_all_failed_is_an_empty_file(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.commit(0, [answer(row, error="no") for row in run.plan.read_shard(0)])
    for shard in (1, 2):
        run.commit(shard, records_of(run.plan, shard))
    run.finish()
    files = str(tmp_path / "run" / "part-*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 4
    assert run.committed()[0].rows == 0


def test_the_card_escapes_what_comes_from_outside(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> | `x` [a](javascript:b)\n# Heading\x1b[2J"
    run = new_run(tmp_path, principals={"brief": {"kind": "prompted", "principle": nasty}})
    for shard in run.plan.shards:
        run.commit(shard, [answer(row, error=f"failed on {nasty}") for row in run.plan.read_shard(shard)])
    run.finish()
    card = (tmp_path / "run" / "_README.md").read_text(encoding="utf-8")
    front, body = card.split("---\n")[1:3]
    assert yaml.safe_load(front)["configs"][0]["data_files"] == [{"split": "train", "path": "part-*.parquet"}]
    assert "<script>" not in card
    assert "\x1b" not in card
    assert "\n# Heading" not in body
    assert "[a](" not in body
    (line,) = [line for line in body.splitlines() if line.startswith("| principals.brief.principle")]
    assert line.replace("\\|", "").count("|") == 3


def test_the_manifest_names_every_file_with_its_hash(tmp_path: Path) -> None:
    run = finished(mixed_run(tmp_path))
    manifest = json.loads((tmp_path / "run" / "_manifest.json").read_text(encoding="utf-8"))
    stored = {name: hashlib.sha256(data).hexdigest() for name, data in tree_bytes(tmp_path / "run").items()}
    assert {file["name"]: file["sha256"] for file in manifest["files"]} == stored
    assert manifest["fingerprint_digest"] == run.plan.digest
    assert (manifest["rows_aligned"], manifest["rows_failed"]) == (5, 2)
    assert (tmp_path / "run" / "_SUCCESS").read_text() == f"{run.plan.digest}\n"


def test_success_is_written_last(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for shard in run.plan.shards:
        run.commit(shard, records_of(run.plan, shard.index))
    for dies_at in (1, 2, 3):
        dying: Any = DyingStore(run.store, dies_at, is_after=False)
        with pytest.raises(Killed):
            Run(dying, run.plan).finish()
        assert not run.is_complete


def test_reasons_are_counted_by_kind() -> None:
    reasons = [f"line {index} of x.jsonl: prompt must be text; got {index}" for index in range(30)]
    reasons += [f"row {index} of a b.parquet is not valid UTF-8" for index in range(3)]
    found = failures_of((f"r{index}", reason) for index, reason in enumerate(reasons))
    counts = {kind: failures.count for kind, failures in found.items()}
    assert counts == {"prompt must be text; got …": 30, "is not valid UTF-8": 3}
    prompt = found["prompt must be text; got …"]
    assert prompt.describe("") == f"30 x {reasons[0]} (rows r0, r1, r2, ...)"
    many = failures_of((str(index), chr(97 + index) * 3) for index in range(25))
    assert sum(failures.count for failures in many.values()) == 25
    assert len(many) == 21


def test_a_run_with_the_earlier_folder_of_failed_rows_is_read_and_resumed(tmp_path: Path) -> None:
    run = mixed_run(tmp_path)
    run.commit(0, records_of(run.plan, 0))
    as_an_earlier_version_wrote_it(tmp_path / "run")
    resumed = finished(Run.open(str(tmp_path / "run")))
    assert resumed.status().failed_folders == ("_rejected",)
    assert {row["error"] is None for row in resumed.find("mixed.jsonl:2")} == {False}
    assert not list(failed_of(resumed))
    assert [file.parent.name for file in (tmp_path / "run").glob("*/*.parquet")] == ["_rejected"]


def as_an_earlier_version_wrote_it(folder: Path) -> None:
    """Give the first shard's failed rows their earlier folder, and its record the fields that it had."""
    (folder / "_failed").rename(folder / "_rejected")
    data = folder / "part-00000-of-00003.parquet"
    table = pq.read_table(data)
    name = table.schema.metadata[b"cage.failed"].decode().replace("_failed/", "_rejected/")
    table = table.replace_schema_metadata({k: v for k, v in table.schema.metadata.items() if k != b"cage.failed"})
    data.write_bytes(write_table_bytes(table, metadata={"cage.rejected": name}))
    commit = folder / "_commits/part-00000.json"
    record = json.loads(commit.read_text(encoding="utf-8").replace("_failed/", "_rejected/"))
    record["sha256_by_file"][data.name] = sha256(data.read_bytes())
    record["rejected"] = record.pop("failed")
    commit.write_text(json.dumps({key: record[key] for key in record if key not in ("examples", "values")}))


def run_with_answers(folder: Path, name: str, answered: list[bool]) -> Run:
    """A finished run in which the rows that are `answered` have an existing answer, which is the better one."""
    lines = [{"prompt": f"{at}", "old": "old" if has else None} for at, has in enumerate(answered)]
    path = write_jsonl(folder / f"{name}.jsonl", lines)
    plan = make_plan(make_config(path, folder / name, input={"response": "old"}), {"base": "tiny@abc123"})
    run = Run.create_or_resume(open_store(str(folder / name)), plan)
    for shard in run.plan.shards:
        records = [
            answer(
                row, text="new", original_response=row.response, chosen=row.response, rejected=row.response and "new"
            )
            for row in run.plan.read_shard(shard)
        ]
        run.commit(shard, records)
    run.finish()
    return run


@pytest.mark.parametrize("answered", [[True, False, True, False, False, False, True], [True] * 4])
def test_pairs_have_no_nulls_and_are_loaded_by_name(tmp_path: Path, answered: list[bool]) -> None:
    run_with_answers(tmp_path, "run", answered)
    cache = str(tmp_path / "hf")
    pairs = datasets.load_dataset(str(tmp_path / "run"), "pairs", split="train", cache_dir=cache)
    assert list(pairs["row_id"]) == [f"run.jsonl:{at + 1}" for at, has in enumerate(answered) if has]
    assert all(pair["chosen"] == [{"role": "assistant", "content": "old"}] for pair in pairs)
    assert all(pair["rejected"] == [{"role": "assistant", "content": "new"}] for pair in pairs)
    answers = datasets.load_dataset(str(tmp_path / "run"), "default", split="train", cache_dir=cache)
    assert len(answers) == len(answered)
    assert len(pd.read_parquet(tmp_path / "run")) == len(answered)
    assert len(Run.open(str(tmp_path / "run")).find("run.jsonl:1")) == 1


def test_a_run_without_any_pair_is_loaded(tmp_path: Path) -> None:
    run_with_answers(tmp_path, "run", [False] * 4)
    assert len(datasets.load_dataset(str(tmp_path / "run"), split="train", cache_dir=str(tmp_path / "hf"))) == 4


def test_columns_that_are_null_in_some_files_keep_their_types(tmp_path: Path) -> None:
    """Whichever file comes first, `load_dataset` takes its types for all."""
    for answered in ([False] * 3 + [True] * 3, [True] * 3 + [False] * 3):
        name = f"run-{int(answered[0])}"
        run_with_answers(tmp_path, name, answered)
        first, second = (pq.read_schema(file) for file in sorted((tmp_path / name).glob("part-*.parquet")))
        assert first.equals(second)
        assert not any(pa.types.is_null(field.type) for field in first)
        files = sorted(map(str, (tmp_path / name).glob("part-*.parquet")))
        for order in (files, files[::-1]):
            rows = datasets.load_dataset("parquet", data_files=order, split="train", cache_dir=str(tmp_path / "hf"))
            assert sorted(each is not None for each in rows["chosen"]) == sorted(answered)
