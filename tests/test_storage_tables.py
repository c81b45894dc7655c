"""Output tables: their columns, and the same bytes for the same rows."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.storage import PRINCIPALS, answer

from pipeline.config.sections import Trace
from pipeline.records import OUTPUT_COLUMNS, Record, Row, TokenTrace
from pipeline.storage.tables import output_schema, to_table, write_table_bytes

COMMON = ["row_id", "sample", "prompt", "completion", "messages", "response", "finish_reason", "num_tokens"]
BY_PRINCIPAL = ["weights", "rewards", "payments"]
MEASURES = ["kl_per_token", "covered_mass", "max_residual", "num_unsolved", "solver_steps", "error"]
COMPARED = ["original_response", "original_rewards", "chosen", "rejected"]
METADATA = {
    "cage.fingerprint": "f" * 64,
    "cage.models.base": "base@1",
    "cage.models.principals.brief.model": "brief@2",
}


def rows(num_rows: int = 5) -> list[Row]:
    return [Row(f"r{index}", ({"role": "user", "content": f"é {index}"},)) for index in range(num_rows)]


def test_the_columns_come_in_the_documented_order() -> None:
    names = list(PRINCIPALS)
    assert output_schema(names).names == COMMON + BY_PRINCIPAL + MEASURES
    assert output_schema(names, has_response=True).names == COMMON + BY_PRINCIPAL + MEASURES + COMPARED
    assert output_schema(names, trace=Trace.TOKENS).names == [*COMMON, *BY_PRINCIPAL, *MEASURES, "tokens"]
    rewards = output_schema(names).field("rewards").type
    assert [(field.name, field.type) for field in rewards] == [(name, pa.float64()) for name in names]


def test_without_principals_there_is_no_empty_struct() -> None:
    for trace in Trace:
        schema = output_schema([], trace=trace, has_response=True)
        assert schema.names[: len(COMMON + MEASURES) + 1] == [*COMMON, *MEASURES, "original_response"]
        table = to_table([answer(row, original_response="old") for row in rows()], schema)
        assert pq.read_table(pa.BufferReader(write_table_bytes(table))).equals(table)


def test_a_record_becomes_a_row_that_trainers_read() -> None:
    record = answer(rows(1)[0], text="Hello", original_response="Bye", chosen="Hello", rejected="Bye")
    (row,) = to_table([record], output_schema(list(PRINCIPALS), has_response=True)).to_pylist()
    prompt, completion = [{"role": "user", "content": "é 0"}], [{"role": "assistant", "content": "Hello"}]
    assert (row["prompt"], row["completion"], row["messages"]) == (prompt, completion, prompt + completion)
    assert (row["chosen"], row["rejected"]) == (completion, [{"role": "assistant", "content": "Bye"}])
    assert row["original_response"] == "Bye"
    assert row["original_rewards"] is None
    assert row["rewards"] == dict(record.rewards)
    assert row["finish_reason"] == "stop"
    assert row["kl_per_token"] == 0.1 + 0.2


def test_traced_tokens_are_a_list_of_structs() -> None:
    traced = TokenTrace(7, "é", -1.5, -0.25, {"brief": 0.5, "kind-1": None}, {"brief": 1.5, "kind-1": None})
    schema = output_schema(list(PRINCIPALS), trace=Trace.TOKENS)
    (row,) = to_table([answer(rows(1)[0], tokens=(traced,))], schema).to_pylist()
    by_name = {"payments": {"brief": 0.5, "kind-1": None}, "thresholds": {"brief": 1.5, "kind-1": None}}
    assert row["tokens"] == [{"token_id": 7, "text": "é", "base_logprob": -1.5, "logprob": -0.25, **by_name}]


def test_a_failed_record_has_its_reason_and_no_answer() -> None:
    bad = Row("r", error="line 1 of x.jsonl: prompt is \ud800 null")
    (row,) = to_table([answer(bad)], output_schema(list(PRINCIPALS))).to_pylist()
    assert row["error"] == "line 1 of x.jsonl: prompt is \\ud800 null"
    assert row["prompt"] == []
    assert (row["completion"], row["messages"], row["response"]) == (None, None, None)


def test_the_same_rows_give_the_same_bytes_however_they_are_chunked() -> None:
    schema = output_schema(list(PRINCIPALS), metadata=METADATA)
    records = [answer(row) for row in rows(50)]
    whole = write_table_bytes(to_table(records, schema))
    for seed in range(5):
        cuts = sorted(random.Random(seed).sample(range(1, 50), 3))
        parts = [to_table(records[low:high], schema) for low, high in zip([0, *cuts], [*cuts, 50], strict=True)]
        assert write_table_bytes(pa.concat_tables(parts)) == whole
    turned = output_schema(list(PRINCIPALS), metadata=dict(reversed(METADATA.items())))
    assert write_table_bytes(to_table(records, turned)) == whole
    assert write_table_bytes(to_table(records[:-1], schema)) != whole


def test_columns_carry_the_fingerprint_and_the_models(tmp_path: Path) -> None:
    schema = output_schema(list(PRINCIPALS), metadata=METADATA)
    (tmp_path / "x.parquet").write_bytes(write_table_bytes(to_table([], schema), metadata={"cage.failed": "name"}))
    read = pq.read_schema(tmp_path / "x.parquet")
    assert {key.decode(): value.decode() for key, value in read.metadata.items()} == {
        **METADATA,
        "cage.failed": "name",
    }
    for field in read:
        assert field.metadata[b"cage.fingerprint"] == b"f" * 64
        assert field.metadata[b"cage.models.base"] == b"base@1"
    assert read.field("rewards").type.field("brief").metadata[b"cage.models.principals.brief.model"] == b"brief@2"


@pytest.mark.parametrize("trace", Trace)
@pytest.mark.parametrize("principals", [[], list(PRINCIPALS)], ids=["none", "two"])
def test_datasets_loads_it(tmp_path: Path, trace: Trace, principals: list[str]) -> None:
    schema = output_schema(principals, trace=trace, has_response=True, metadata=METADATA)
    traced = TokenTrace(7, "é", -1.5, -0.25, dict.fromkeys(PRINCIPALS, 0.5), dict.fromkeys(PRINCIPALS, 1.5))
    for index, records in enumerate(
        ([answer(row, chosen="a", rejected="b", tokens=(traced,)) for row in rows()], [])
    ):
        (tmp_path / f"part-{index}.parquet").write_bytes(write_table_bytes(to_table(records, schema)))
    files = str(tmp_path / "part-*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == schema.names
    assert len(loaded) == 5
    assert loaded[1]["prompt"] == [{"role": "user", "content": "é 1"}]
    assert loaded[1]["completion"][0]["role"] == "assistant"


def test_records_of_a_row_keep_their_order(tmp_path: Path) -> None:
    records: list[Record] = [answer(row, sample=sample) for row in rows(3) for sample in range(2)]
    table = to_table(records, output_schema(list(PRINCIPALS)))
    assert [(row["row_id"], row["sample"]) for row in table.to_pylist()] == [
        (record.row_id, record.sample) for record in records
    ]


def test_every_column_of_the_output_is_reserved() -> None:
    flags = ("response", "variants", "units", "temperatures", "tools", "reasoning", "proposals")
    has = {f"has_{name}": True for name in flags}
    assert tuple(output_schema(("a",), trace=Trace.TOKENS, **has).names) == OUTPUT_COLUMNS
