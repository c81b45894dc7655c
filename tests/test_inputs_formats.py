"""Inputs of every format give the same rows, and reading from the middle gives what reading from the start gives."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.storage import write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError
from pipeline.inputs import tabular
from pipeline.inputs.files import Format, InputFile
from pipeline.inputs.rows import InputColumns, LastAssistant
from pipeline.inputs.source import InputSource, open_input
from pipeline.records import Row

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
RECORDS: list[dict[str, Any]] = [
    {
        "key": f"k{index}",
        "prompt": f"question {index}",
        "messages": CHAT,
        "w": {"a": index / 2},
        "old": f"answer {index}",
    }
    for index in range(10)
]


def opened(path: Path, principals: tuple[str, ...] = (), **fields: Any) -> InputSource:
    return open_input(InputConfig(path=str(path), **fields), principals, stride=4)


def write_parquet(path: Path, records: list[dict[str, Any]], *, row_group_size: int = 3) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=row_group_size)
    return path


def write_either(suffix: str, folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / f"data{suffix}"
    return write_parquet(path, records) if suffix == ".parquet" else write_jsonl(path, records)


@pytest.fixture(params=[".parquet", ".jsonl"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_either(request.param, tmp_path, RECORDS)


def test_every_named_column_is_read(data: Path) -> None:
    source = opened(data, ("a", "b"), prompt="prompt", id="key", weights="w", response="old")
    assert source.num_rows == 10
    assert source.column_names == ("key", "prompt", "messages", "w", "old")
    assert list(source) == [
        Row(
            f"k{i}",
            ({"role": "user", "content": f"question {i}"},),
            {"a": i / 2},
            f"answer {i}",
            file=data.name,
            number=i + (data.suffix == ".jsonl"),  # lines count from 1
        )
        for i in range(10)
    ]


def test_messages_are_preferred_to_a_prompt_and_read_as_they_are(data: Path) -> None:
    rows = list(opened(data))
    assert all(row.messages == tuple(CHAT) for row in rows)
    assert opened(data).columns == InputColumns(messages="messages", last_assistant=LastAssistant.UNEXPECTED)


def test_rows_without_an_id_are_named_by_file_and_position(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, b"", b"  \t", {"prompt": "y"}])
    assert [row.row_id for row in opened(lines)] == ["a.jsonl:1", "a.jsonl:4"]
    table = write_parquet(tmp_path / "a.parquet", [{"prompt": "x"}, {"prompt": "y"}])
    assert [row.row_id for row in opened(table)] == ["a.parquet:0", "a.parquet:1"]


def test_whole_numbers_are_ids_too(tmp_path: Path) -> None:
    for suffix in (".parquet", ".jsonl"):
        path = write_either(suffix, tmp_path, [{"prompt": "x", "n": 7}, {"prompt": "y", "n": -(2**40)}])
        assert [row.row_id for row in opened(path, id="n")] == ["7", str(-(2**40))]


def test_batch_requests_are_recognised_by_their_shape(tmp_path: Path) -> None:
    requests = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": CHAT},
        }
        for i in range(3)
    ]
    source = opened(write_jsonl(tmp_path / "batch.jsonl", [*requests, {"custom_id": "r3", "body": {}}]))
    assert source.files[0].format is Format.BATCH
    rows = list(source)
    assert [row.row_id for row in rows[:3]] == ["r0", "r1", "r2"]
    assert rows[0].messages == tuple(CHAT)
    assert rows[3].row_id == "r3"
    assert rows[3].error == (
        "line 4 of batch.jsonl: messages cannot be read: there is no body.messages; only requests of "
        "/v1/chat/completions and /v1/responses are read"
    )


def test_a_folder_is_its_files_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "_rejected.jsonl", ".hidden.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": name}])
    write_parquet(tmp_path / "c.parquet", [{"prompt": "c.parquet"}])
    write_jsonl(tmp_path / "d.jsonl", [])
    (tmp_path / "README.md").write_text("not an input")
    (tmp_path / "below").mkdir()
    write_jsonl(tmp_path / "below" / "z.jsonl", [{"prompt": "below"}])
    source = opened(tmp_path)
    assert [row.messages[0]["content"] for row in source] == ["a.jsonl", "b.jsonl", "c.parquet"]
    assert [file.name for file in source.files] == ["a.jsonl", "b.jsonl", "c.parquet"]


@pytest.mark.parametrize("limit", [1, 4, 5, 9, 10, 11, 1000])
def test_a_limit_takes_the_first_rows_over_all_files(tmp_path: Path, limit: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:5])
    write_parquet(tmp_path / "b.parquet", RECORDS[5:])
    every = [row.row_id for row in opened(tmp_path, id="key")]
    assert [row.row_id for row in opened(tmp_path, id="key", limit=limit)] == every[:limit]
    assert opened(tmp_path, limit=limit).num_rows == min(limit, 10)


def test_with_a_limit_nothing_after_it_matters(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    before = opened(path, limit=5).files
    write_jsonl(path, [*RECORDS[:5], b"\xff\xff"])
    assert opened(path, limit=5).files == before


@given(
    lines=st.lists(st.sampled_from([b'{"prompt": "a"}', b"", b"  ", b"\xff", b"[]", b'{"prompt": "\xc3\xa9"}\r'])),
    stride=st.integers(1, 5),
    last=st.sampled_from([b"", b"\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    ends=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_of_lines_is_the_slice_of_all_lines(
    tmp_path: Path, lines: list[bytes], stride: int, last: bytes, mark: bytes, ends: tuple[int, int]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(mark + b"\n".join([*lines, b'{"prompt": "z"}']) + last)
    source = open_input(InputConfig(path=str(path)), stride=stride)
    every = list(source)
    start, stop = sorted(min(end, source.num_rows) for end in ends)
    assert list(source.read_rows(0, start, stop)) == every[start:stop]
    assert [int(row.row_id.split(":")[1]) for row in every] == [
        number for number, line in enumerate([*lines, b"z"], start=1) if line.strip()
    ]


@given(
    num_rows=st.integers(1, 40),
    row_group_size=st.integers(1, 15),
    ends=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_of_a_table_is_the_slice_of_all_rows(
    tmp_path: Path,
    num_rows: int,
    row_group_size: int,
    ends: tuple[int, int],
) -> None:
    records = [{"prompt": f"q{i}", "n": i} for i in range(num_rows)]
    source = opened(write_parquet(tmp_path / "x.parquet", records, row_group_size=row_group_size), id="n")
    start, stop = sorted(min(end, num_rows) for end in ends)
    assert [row.row_id for row in source.read_rows(0, start, stop)] == [str(i) for i in range(start, stop)]


def test_a_range_in_the_middle_of_jsonl_reads_only_its_part(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ({"prompt": f"{index:>1000}"} for index in range(20_000)))
    source = open_input(InputConfig(path=str(path)), stride=100)
    position = path.stat().st_size // 2
    with path.open("r+b") as file:  # a hole before the shard would not be valid UTF-8
        file.write(b"\xff" * (position - 100_000))
    rows = list(source.read_rows(0, 10_100, 10_200))
    assert [row.error for row in rows] == [None] * 100
    assert rows[0].row_id == "x.jsonl:10101"


def test_a_range_of_parquet_leaves_other_row_groups_and_columns_unread(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", [{"prompt": f"q{i}", "big": "x" * 100} for i in range(30)], row_group_size=10
    )
    source = opened(path)
    group = pq.read_metadata(path)
    damaged = bytearray(path.read_bytes())
    for row_group, column in ((0, 0), (2, 0), (0, 1), (1, 1), (2, 1)):
        chunk = group.row_group(row_group).column(column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        damaged[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(damaged)
    assert [row.messages[0]["content"] for row in source.read_rows(0, 10, 20)] == [f"q{i}" for i in range(10, 20)]
    with pytest.raises(ConfigurationError, match=r"x\.parquet cannot be read: "):
        list(source.read_rows(0, 0, 10))


def test_every_text_and_list_type_of_arrow_is_read(tmp_path: Path) -> None:
    texts = ["a", "é", "日本"]
    for index, type_ in enumerate(
        (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
    ):
        path = tmp_path / f"{index}.parquet"
        pq.write_table(pa.table({"prompt": pa.array(texts).cast(type_)}), path)
        assert [row.messages[0]["content"] for row in opened(path)] == texts
    message = pa.struct([("content", pa.large_string()), ("role", pa.string()), ("name", pa.string())])
    for index, list_type in enumerate((pa.list_(message), pa.large_list(message))):
        path = tmp_path / f"m{index}.parquet"
        pq.write_table(pa.table({"messages": pa.array([[{"role": "user", "content": "x"}]], list_type)}), path)
        assert next(iter(opened(path))).messages == ({"role": "user", "content": "x"},)


def test_weights_come_as_a_struct_or_as_a_map(tmp_path: Path) -> None:
    for index, type_ in enumerate(
        (pa.map_(pa.string(), pa.float32()), pa.struct([("a", pa.float64()), ("b", pa.int64())]))
    ):
        path = tmp_path / f"{index}.parquet"
        values = pa.array([{"a": 0.5}, None, {"a": 1.0, "b": 2}], type_)
        pq.write_table(pa.table({"prompt": ["x", "y", "z"], "w": values}), path)
        rows = list(opened(path, ("a", "b"), weights="w"))
        assert [row.weights for row in rows[1:]] == [None, {"a": 1.0, "b": 2.0}]
        if pa.types.is_map(type_):
            assert rows[0].weights == {"a": 0.5}
        else:  # a struct has every field, so what is left out is null
            assert rows[0].error == (
                f"row 0 of {path.name}: the weight of b is null; give a number, or leave it out to keep the "
                "configured one"
            )


def test_a_data_set_is_read_like_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "owner"
    folder.mkdir()
    write_jsonl(folder / "data.jsonl", [{**record, "w": {"a": 1.0}} for record in RECORDS])
    columns = InputColumns(prompt="prompt", id="key", weights="w", response="old")
    file = InputFile(str(folder), "owner:train", Format.DATASET, columns, 10, "", split="train")
    source = InputSource((file,), principal_names=("a",))
    assert [row.row_id for row in source.read_rows(0, 3, 6)] == ["k3", "k4", "k5"]
    assert list(source)[9] == Row(
        "k9", ({"role": "user", "content": "question 9"},), {"a": 1.0}, "answer 9", file="owner:train", number=9
    )
    first = tabular.dataset_identity(file)
    assert first == tabular.dataset_identity(file)
    other = InputFile(str(folder), "owner:train", Format.DATASET, InputColumns(prompt="old"), 10, "", split="train")
    assert tabular.dataset_identity(other) != first


def test_reading_needs_no_second_look_at_the_whole_input(data: Path) -> None:
    """An opened source is plain data: it can be sent to another process and read there."""
    source = pickle.loads(pickle.dumps(opened(data, id="key")))
    assert [row.row_id for row in source.read_rows(0, 8, 10)] == ["k8", "k9"]


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "x.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    source = open_input(InputConfig(path="x.jsonl"))
    monkeypatch.chdir("/")
    assert len(list(source)) == 10
    assert source.files[0].name == "x.jsonl"
