"""Columns of the input that the output carries: with their values and types, whatever the format."""

from __future__ import annotations

import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.storage import answer, make_config, tree_bytes, write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError
from pipeline.inputs.notes import describe_input
from pipeline.inputs.source import is_unchanged, open_input
from pipeline.inputs.tabular import load_dataset
from pipeline.records import OUTPUT_COLUMNS
from pipeline.storage.plan import Plan, cut, make_plan, open_planned_input
from pipeline.storage.reruns import choose_mended
from pipeline.storage.run import Run
from pipeline.stores.store import open_store

NUMBERS = [1, 2, None, 4, 5]


def planned(path: Path, keep: Any, **fields: Any) -> Plan:
    config = make_config(path, path.parent / f"{path.stem}-run", input={"keep": keep, **fields})
    return Plan.from_json(make_plan(config, {"base": "tiny"}).to_json())


def run_on(path: Path, keep: Any, **fields: Any) -> Run:
    """A finished run; rows that could be read are answered."""
    plan = planned(path, keep, **fields)
    run = Run.create_or_resume(open_store(plan.config["output"]["path"]), plan)
    for shard in plan.shards:
        run.commit(shard, [answer(row, chosen="a", rejected="b") for row in plan.read_shard(shard)])
    run.finish()
    return run


def table_of(run: Run) -> pa.Table:
    return pq.read_table(run.store.path)


def refusal_of(path: Path, keep: Any, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        planned(path, keep, **fields)
    return str(refused.value)


def test_values_of_json_keep_their_types_or_become_json_text(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": f"{at}", "n": number, "x": at / 2 if at else 3, "tag": "a", "ok": True, "mixed": number or "none",
         "tree": {"a": [at]}, "empty": None, "big": 2**70}
        for at, number in enumerate(NUMBERS)
    ]  # fmt: skip
    records[4]["late"] = "only here"
    records[3]["exact"], records[4]["exact"] = 2**60 + 1, 0.5  # no float holds the former
    table = table_of(run_on(write_jsonl(tmp_path / "x.jsonl", records), "all"))
    kept = ["n", "x", "tag", "ok", "mixed", "tree", "empty", "big", "exact", "late"]
    assert table.schema.names[-len(kept) :] == kept
    types = {name: str(table.schema.field(name).type) for name in kept}
    assert types == {
        "n": "int64", "x": "double", "tag": "string", "ok": "bool", "mixed": "string", "tree": "string",
        "empty": "string", "big": "string", "exact": "string", "late": "string",
    }  # fmt: skip
    assert table["n"].to_pylist() == NUMBERS
    assert table["x"].to_pylist() == [3.0, 0.5, 1.0, 1.5, 2.0]
    assert [json.loads(each) for each in table["mixed"].to_pylist()] == [1, 2, "none", 4, 5]
    assert [json.loads(each) for each in table["tree"].to_pylist()] == [{"a": [at]} for at in range(5)]
    assert table["exact"].to_pylist() == [None] * 3 + [str(2**60 + 1), "0.5"]
    assert table["late"].to_pylist() == [None] * 4 + ["only here"]


def test_columns_of_parquet_keep_their_types(tmp_path: Path) -> None:
    columns = {
        "prompt": pa.array(["a", "b", "c", "d", "e"]),
        "n": pa.array(NUMBERS, pa.int8()),
        "day": pa.array([datetime.date(2026, 1, at) for at in range(1, 6)]),
        "list": pa.array([[at] for at in range(5)], pa.list_(pa.int32())),
        "tree": pa.array([{"a": {"b": at}} for at in range(5)]),
        "word": pa.array(["u", "v", "u", None, "u"]).dictionary_encode(),
        "uuid": pa.array([uuid.UUID(int=at).bytes for at in range(5)], pa.uuid()),
        "null": pa.nulls(5),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=2)
    run = run_on(tmp_path / "x.parquet", "all")
    table = table_of(run)
    for name in ("n", "day", "list", "tree"):
        assert table.schema.field(name).type == columns[name].type
        assert table[name].to_pylist() == columns[name].to_pylist()
    assert table["word"].to_pylist() == ["u", "v", "u", None, "u"]
    assert table["uuid"].to_pylist() == [str(uuid.UUID(int=at)) for at in range(5)]
    assert table.schema.field("null").type == pa.string()
    loaded = datasets.load_dataset(run.store.path, split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded["n"] == NUMBERS


def test_chosen_columns_are_kept_in_their_order_and_failed_rows_keep_theirs(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "b": 1, "c": "x"},
        {"prompt": None, "b": 2, "c": "y"},
        b"broken",
        {"prompt": "d", "b": 4},
    ]
    run = run_on(write_jsonl(tmp_path / "x.jsonl", lines), ["c", "b"])
    table = table_of(run)
    assert table.schema.names[-2:] == ["c", "b"]
    assert table.select(["c", "b"]).to_pylist() == [{"c": "x", "b": 1}, {"c": None, "b": 4}]
    [failed] = tree_bytes(Path(run.store.path), "_failed/*.parquet").values()
    rows = pq.read_table(pa.py_buffer(failed)).select(["c", "b"]).to_pylist()
    assert rows == [{"c": "y", "b": 2}, {"c": None, "b": None}]
    assert "of the input, as it was" in (Path(run.store.path) / "_README.md").read_text()


def test_pairs_have_the_kept_columns_too(tmp_path: Path) -> None:
    records = [{"prompt": "a", "old": "x", "source": "s"}]
    run = run_on(write_jsonl(tmp_path / "x.jsonl", records), ["source"], response="old")
    [pairs] = tree_bytes(Path(run.store.path), "_pairs/*.parquet").values()
    assert pq.read_table(pa.py_buffer(pairs))["source"].to_pylist() == ["s"]


def test_csv_is_kept_as_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,n\na,1\nb,\n")
    assert table_of(run_on(tmp_path / "x.csv", "all"))["n"].to_pylist() == ["1", None]


def test_all_leaves_out_what_is_read_under_a_name_of_the_output(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "response": "old", "question": "q"}])
    assert planned(path, "all", response="response").open_input().kept.names == ["question"]


def test_every_name_of_the_output_is_refused_with_a_way_out(tmp_path: Path) -> None:
    names = {"row_id", "rewards", "tokens", "chosen", "variant", "tools", "original_rewards", "error"}
    assert names <= set(OUTPUT_COLUMNS)
    for name in (*sorted(OUTPUT_COLUMNS), "Rewards"):
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", name: 1, "fine": 2}])
        expected = f"input.keep: the output has columns of its own named '{name}'; rename them in the input, or list"
        assert refusal_of(path, [name], prompt="text").startswith(expected)
        assert refusal_of(path, "all", prompt="text").startswith(expected)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "n": 1}])
    assert refusal_of(path, ["m"]) == "input.keep: there is no column 'm'; columns: 'prompt', 'n'"


def test_types_are_unified_over_files_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"prompt": ["a"], "n": pa.array([1], pa.int32())}), folder / "a.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "n": pa.array([2.5])}), folder / "b.parquet")
    write_jsonl(folder / "c.jsonl", [{"prompt": "c", "m": "x"}])
    run = run_on(folder, "all")
    assert table_of(run).select(["n", "m"]).to_pylist() == [
        {"n": 1.0, "m": None}, {"n": 2.5, "m": None}, {"n": None, "m": "x"},
    ]  # fmt: skip
    write_jsonl(folder / "c.jsonl", [{"prompt": "c", "n": "text"}])
    assert "the types of the column 'n' do not agree from file to file" in refusal_of(folder, "all")


def test_a_run_that_keeps_nothing_has_the_plan_and_the_bytes_it_had(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "n": 1}])
    plan, default = planned(path, []), make_plan(make_config(path, tmp_path / "x-run"), {"base": "tiny"})
    assert plan.digest == default.digest
    assert "input.keep" not in plan.fingerprint
    assert planned(path, "all").fingerprint["input.keep"] == "all"


def test_an_input_that_changed_is_refused_when_a_shard_is_written(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "n": 1}])
    plan = planned(path, "all")
    run = Run.create_or_resume(open_store(plan.config["output"]["path"]), plan)
    write_jsonl(path, [{"prompt": "a", "n": "one"}])
    with pytest.raises(ConfigurationError, match="column 'n' of the input has other values than when"):
        run.commit(0, [answer(row) for row in plan.read_shard(0)])


def test_the_plan_names_what_is_kept_and_what_becomes_json_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "n": 1, "tree": {"a": 1}}])
    config = make_config(path, input={"keep": "all"})
    notes = describe_input(open_planned_input(config), config)
    assert "kept in the output: 'n', 'tree' (as JSON text)" in notes


@pytest.mark.parametrize(
    "type_",
    [
        pa.struct([]), pa.list_(pa.struct([])), pa.struct([("a", pa.int64()), ("b", pa.struct([]))]),
        pa.month_day_nano_interval(), pa.run_end_encoded(pa.int32(), pa.string()),
    ],
    ids=str,
)  # fmt: skip
def test_a_type_that_parquet_does_not_have_is_refused_before_anything_is_decoded(tmp_path: Path, type_: Any) -> None:
    is_encoded = pa.types.is_run_end_encoded(type_)
    values = pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), ["a"]) if is_encoded else pa.nulls(2, type_)
    table = pa.table({"prompt": ["x", "y"], "kind": ["a", "b"], "meta": values})
    with pa.ipc.new_file(tmp_path / "data.arrow", table.schema) as file:
        file.write_table(table)
    expected = f"Parquet, as which the output is written, has no type for the column 'meta' ({type_}); convert it, or"
    assert refusal_of(tmp_path / "data.arrow", "all").startswith(f"input.keep: {expected}")
    assert planned(tmp_path / "data.arrow", ["kind"]).fingerprint["input.keep"] == ["kind"]


def test_kept_columns_of_a_data_set_that_changed_are_another_input(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    config = InputConfig(path=f"datasets:{folder}", keep="all")

    def opened(source: str, **fields: Any) -> Any:
        pq.write_table(pa.table({"prompt": ["x"], "source": [source]}), folder / "train.parquet")
        load_dataset.cache_clear()
        [file] = open_input(config.model_copy(update=fields)).files
        return file

    first = opened("a")
    assert is_unchanged(first)
    assert opened("a").identity == first.identity
    assert opened("b").identity != first.identity
    assert not is_unchanged(first)
    assert opened("a", keep=["source"]).identity == first.identity
    assert opened("a", keep=[]).identity == opened("b", keep=[]).identity


def test_a_kept_value_that_is_no_number_is_no_other_content(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"

    def write(*scores: float) -> None:
        pq.write_table(pa.table({"prompt": ["x", "y"], "score": list(scores)}), path)

    write(float("nan"), 0.5)
    run = run_on(path, ["score"])
    config = InputConfig(path=str(path), keep=["score"])

    def mended() -> frozenset[str]:
        source = open_input(config, run.plan.principal_names)
        return choose_mended(run, source, tuple(cut(source.files, 8)), ()).ids

    assert mended() == set()
    write(float("nan"), 0.25)
    assert mended() == {"x.parquet:1"}
