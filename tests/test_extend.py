"""A run whose input has grown goes on with the new rows; its rows are those of a run over the whole input."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import job, parts, run_job

from pipeline.errors import InputChanged, RunMismatch
from pipeline.stages.relabel import relabel
from pipeline.storage.run import Run


def rows_between(start, stop):
    return [{"id": f"r{at}", "prompt": "tell me " * (at % 4) + "x" * (at + 1)} for at in range(start, stop)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_text(rows):
    return "".join(f'{row["id"]},"{row["prompt"]}"\n' for row in rows).encode()


# how the first rows are written, and how the file looks when it has grown
GROWN = {
    "lines.jsonl": (jsonl(rows_between(0, 5)), jsonl(rows_between(0, 9))),
    "no_line_break.jsonl": (jsonl(rows_between(0, 5)).rstrip(b"\n"), jsonl(rows_between(0, 9))),
    "blank_lines.jsonl": (
        jsonl(rows_between(0, 5)) + b"\n \n",
        jsonl(rows_between(0, 5)) + b"\n \n" + jsonl(rows_between(5, 9)),
    ),
    "table.csv": (b"id,prompt\n" + csv_text(rows_between(0, 5)), b"id,prompt\n" + csv_text(rows_between(0, 9))),
    "array.json": (json.dumps(rows_between(0, 5)).encode(), json.dumps(rows_between(0, 9), indent=None).encode()),
    "packed.jsonl.gz": (gzip.compress(jsonl(rows_between(0, 5))), gzip.compress(jsonl(rows_between(0, 9)))),
}  # fmt: skip


def rows_of(folder):
    return [row for name in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(name).to_pylist()]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The rows of a run over nine prompts at once."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.jsonl").write_bytes(jsonl(rows_between(0, 9)))
    run_job(job(folder / "prompts.jsonl", folder / "run", tiny()), folder)
    return rows_of(folder / "run")


@pytest.mark.parametrize("name", GROWN)
def test_rows_at_the_end_of_a_file_are_added(name, whole, tiny, tmp_path):
    before, after = GROWN[name]
    prompts, output = tmp_path / name, tmp_path / "run"
    prompts.write_bytes(before)
    config = job(prompts, output, tiny())
    run_job(config, tmp_path)
    files = parts(output)
    prompts.write_bytes(after)
    with pytest.raises(RunMismatch, match="add --extend"):
        run_job(config, tmp_path)
    run, was_run = run_job(config, tmp_path, may_extend=True)
    assert was_run
    assert run.is_complete
    assert rows_of(output) == whole
    assert {name: parts(output)[name] for name in files} == files
    assert sorted(set(parts(output)) - set(files)) == ["part-00002-of-00004.parquet", "part-00003-of-00004.parquet"]
    assert run_job(config, tmp_path) == (run, False)  # the command without the option, too


def test_new_files_are_added_wherever_their_names_come(whole, tiny, tmp_path):
    folder, output = tmp_path / "prompts", tmp_path / "run"
    folder.mkdir()
    (folder / "b.jsonl").write_bytes(jsonl(rows_between(0, 4)))
    config = job(folder, output, tiny())
    run_job(config, tmp_path)
    (folder / "a.jsonl").write_bytes(jsonl(rows_between(4, 7)))
    run_job(config, tmp_path, may_extend=True)
    (folder / "b.jsonl").write_bytes(jsonl([*rows_between(0, 4), *rows_between(7, 8)]))
    (folder / "c.jsonl").write_bytes(jsonl(rows_between(8, 9)))
    run, _ = run_job(config, tmp_path, may_extend=True)
    assert sorted(rows_of(output), key=lambda row: row["row_id"]) == whole
    assert [(each.num_rows, each.num_shards) for each in run.plan.earlier] == [(4, 2), (7, 3)]
    assert Run.open(str(output)).plan == run.plan
    manifest = json.loads((output / "_manifest.json").read_bytes())
    assert (manifest["num_input_rows"], manifest["rows_aligned"], len(manifest["files"])) == (9, 9, 5)
    assert len([row for name in parts(output) for row in run.find(f"r{name[9]}")]) == 5


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_larger_limit_makes_the_whole_of_a_trial(kind, whole, tiny, tmp_path):
    prompts, output = tmp_path / f"prompts.{kind}", tmp_path / "run"
    if kind == "jsonl":
        prompts.write_bytes(jsonl(rows_between(0, 9)))
    else:
        pq.write_table(pa.Table.from_pylist(rows_between(0, 9)), prompts)
    for limit in (2, 7, None):
        run, was_run = run_job(job(prompts, output, tiny(), input={"limit": limit}), tmp_path)
        assert was_run
        assert run.status().rows_aligned == min(limit or 9, 9)
    assert rows_of(output) == whole
    with pytest.raises(RunMismatch, match=r"input\.limit"):
        run_job(job(prompts, output, tiny(), input={"limit": 5}), tmp_path, may_extend=True)


CHANGES = {
    "first row": lambda folder: change(folder / "a.jsonl", b"x", b"y"),
    "row removed": lambda folder: change(folder / "a.jsonl", jsonl(rows_between(2, 3)), b""),
    "line continued": lambda folder: change(folder / "b.jsonl", b"}\n", b' , "z": 1}\n'),
    "blank line before": lambda folder: change(folder / "a.jsonl", b'{"id": "r0"', b'\n{"id": "r0"'),
    "file gone": lambda folder: (folder / "b.jsonl").unlink(),
    "table": lambda folder: pq.write_table(pa.Table.from_pylist(rows_between(20, 24)), folder / "t.parquet"),
}  # fmt: skip
SAID = {
    "first row": "a.jsonl has changed in its first 3 rows",
    "row removed": "a.jsonl has changed in its first 3 rows",
    "line continued": "b.jsonl has changed in its first 1 rows",
    "blank line before": "a.jsonl has changed in its first 3 rows",
    "file gone": "b.jsonl is not in the input any more",
    "table": "t.parquet has changed in its first 2 rows; a table is compared as a whole, so add rows in a file",
}


def change(path: Path, old: bytes, new: bytes) -> None:
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, 1) + jsonl(rows_between(30, 33)))


@pytest.mark.parametrize("what", CHANGES)
def test_a_row_that_the_run_has_must_stay_as_it_was(what, tiny, tmp_path):
    folder, output = tmp_path / "prompts", tmp_path / "run"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(rows_between(0, 3)))
    (folder / "b.jsonl").write_bytes(jsonl(rows_between(10, 11)))
    pq.write_table(pa.Table.from_pylist(rows_between(20, 22)), folder / "t.parquet")
    config = job(folder, output, tiny())
    run_job(config, tmp_path)
    (folder / "c.jsonl").write_bytes(jsonl(rows_between(40, 42)))
    CHANGES[what](folder)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(InputChanged) as caught:
        run_job(config, tmp_path, may_extend=True)
    assert SAID[what] in str(caught.value)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_an_option_that_has_nothing_to_add_changes_nothing(tiny, tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(jsonl(rows_between(0, 2)))
    config = job(tmp_path / "prompts.jsonl", tmp_path / "run", tiny())
    assert run_job(config, tmp_path, may_extend=True)[1]  # it begins a run, too
    assert not run_job(config, tmp_path, may_extend=True)[1]
    assert not (tmp_path / "run/_plan.1.json").exists()


def test_a_new_row_with_an_id_of_the_run_fails_alone(tiny, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_bytes(jsonl(rows_between(0, 3)))
    config = job(prompts, output, tiny(), errors={"budget": 1})
    run_job(config, tmp_path)
    prompts.write_bytes(jsonl([*rows_between(0, 3), *rows_between(1, 2), *rows_between(3, 4)]))
    run, _ = run_job(config, tmp_path, may_extend=True)
    assert [row["row_id"] for row in rows_of(output)] == ["r0", "r1", "r2", "r3"]
    (failed,) = [row for path in output.glob("_failed/*") for row in pq.read_table(path).to_pylist()]
    assert (failed["row_id"], "is the id of several rows" in failed["error"]) == ("prompts.jsonl:4", True)
    assert run.status().rows_failed == 1


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"source": 1.5}, "input.keep: with the new rows the column 'source' holds double, and int64"),
        ({"source": 1, "more": "x"}, "input.keep: the new rows have the column 'more'"),
    ],
)
def test_new_rows_that_do_not_fit_the_columns_of_the_run_are_refused(new, said, tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(jsonl([{**row, "source": 1} for row in rows_between(0, 2)]))
    config = job(prompts, tmp_path / "run", tiny(), input={"keep": "all"})
    run_job(config, tmp_path)
    prompts.write_bytes(
        jsonl([{**row, "source": 1} for row in rows_between(0, 2)] + [{"id": "n", "prompt": "x", **new}])
    )
    with pytest.raises(Exception, match=said):
        run_job(config, tmp_path, may_extend=True)


def test_the_command_says_what_it_adds(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(jsonl(rows_between(0, 3)))
    config, out = job(prompts, tmp_path / "run", tiny()), io.StringIO()
    run_job(config, tmp_path)
    prompts.write_bytes(jsonl(rows_between(0, 7)))
    relabel(config, tmp_path / "cache", out, may_extend=True)
    assert "the run is extended by 4 rows in 2 shards, to 7 rows" in out.getvalue()
