"""Every kind of file gives the same rows as JSON lines do, from any mark; what is not read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.storage import make_config, write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError
from pipeline.inputs.listing import FORMAT_BY_SUFFIX
from pipeline.inputs.source import InputSource, open_input
from pipeline.storage.plan import Plan, make_plan

TEXTS = [
    "plain",
    'a "quoted", comma',
    "two\nlines",
    "tab\there",
    "é ⇒ 漢字",
    "[1, {2}]",
    '\\" \\',
    "x" * 3000,
    "last",
]
RECORDS = [{"key": f"k{at}", "prompt": text} for at, text in enumerate(TEXTS)]


def as_jsonl(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in records)


def as_delimited(records: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["key", "prompt"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def as_zstd(data: bytes) -> bytes:
    """Two frames, one after the other, as parallel compressors write."""
    half = len(data) // 2
    return b"".join(bytes(pa.Codec("zstd").compress(part)) for part in (data[:half], data[half:]))


def as_arrow(records: list[dict[str, Any]], *, is_stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(records), pa.BufferOutputStream()
    new_writer = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def as_feather(records: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.feather.write_feather(pa.Table.from_pylist(records), sink, compression="zstd", chunksize=2)
    return bytes(sink.getvalue())


def as_parquet(records: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=2)
    return bytes(sink.getvalue())


TEXT_BY_SUFFIX: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": as_jsonl,
    ".ndjson": as_jsonl,
    ".json": lambda records: json.dumps(records, indent=2, ensure_ascii=False).encode(),
    ".csv": lambda records: as_delimited(records, ","),
    ".tsv": lambda records: as_delimited(records, "\t"),
}
LAYERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": as_zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
MARKS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
TABLES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".parquet": as_parquet,
    ".pq": as_parquet,
    ".arrow": lambda records: as_arrow(records, is_stream=True),
    ".ipc": lambda records: as_arrow(records, is_stream=False),
    ".feather": as_feather,
}


def opened(path: Path | str, **fields: Any) -> InputSource:
    return open_input(InputConfig(path=str(path), **fields), stride=4)


def prompts_of(source: InputSource) -> list[str]:
    rows = list(source)
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.messages[0]["content"] for row in rows]


def refusal_of(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        opened(path, **fields)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def opened_or_refused(path: Path) -> InputSource | str:
    try:
        return opened(path)
    except ConfigurationError as error:
        return str(error)


def check_every_slice(path: Path) -> None:
    """All rows are right, and so is every range, as read by the plan that was stored."""
    source = opened(path, id="key")
    assert [row.row_id for row in source] == [each["key"] for each in RECORDS]
    assert prompts_of(source) == TEXTS
    plan = make_plan(make_config(path, input={"id": "key"}), {"base": "tiny"})
    stored = Plan.from_json(plan.to_json())
    whole = list(source)
    for shard in stored.shards:
        assert list(stored.read_shard(shard)) == whole[shard.start : shard.stop]
    for start in range(len(whole)):
        assert list(source.read_rows(0, start, len(whole))) == whole[start:]
    assert prompts_of(opened(path, limit=3)) == TEXTS[:3]


def test_every_format_is_tested() -> None:
    assert {*TEXT_BY_SUFFIX, *TABLES} == set(FORMAT_BY_SUFFIX)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("suffix", TEXT_BY_SUFFIX)
def test_text_of_every_format_and_compression_is_read(tmp_path: Path, suffix: str, layer: str) -> None:
    path = tmp_path / f"data{suffix}{layer}"
    path.write_bytes(LAYERS[layer](TEXT_BY_SUFFIX[suffix](RECORDS)))
    check_every_slice(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", TEXT_BY_SUFFIX)
def test_text_of_every_encoding_is_known_by_its_mark(tmp_path: Path, suffix: str, encoding: str) -> None:
    data = MARKS.get(encoding, b"") + TEXT_BY_SUFFIX[suffix](RECORDS).decode().encode(encoding)
    (tmp_path / f"data{suffix}").write_bytes(data)
    check_every_slice(tmp_path / f"data{suffix}")
    (tmp_path / f"packed{suffix}.gz").write_bytes(gzip.compress(data))
    check_every_slice(tmp_path / f"packed{suffix}.gz")


@pytest.mark.parametrize("suffix", TABLES)
def test_tables_of_every_format_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(TABLES[suffix](RECORDS))
    check_every_slice(path)


def test_a_compression_is_known_by_its_bytes_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl.gz").write_bytes(as_jsonl(RECORDS))
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(as_jsonl(RECORDS)))
    assert prompts_of(opened(tmp_path)) == [*TEXTS, *TEXTS]


def test_a_recompressed_file_is_the_same_input(tmp_path: Path) -> None:
    identities = set()
    for suffix, layer in LAYERS.items():
        path = tmp_path / f"data.jsonl{suffix}"
        path.write_bytes(layer(as_jsonl(RECORDS)))
        identities.add(opened(path).files[0].identity)
    assert len(identities) == 1


@pytest.mark.parametrize("layer", [name for name in LAYERS if name])
def test_a_file_cut_short_is_refused_and_no_row_is_lost_silently(tmp_path: Path, layer: str) -> None:
    packed = LAYERS[layer](as_jsonl([{"prompt": f"{at} {at * 7919}"} for at in range(4000)]))
    (tmp_path / f"x.jsonl{layer}").write_bytes(packed[: len(packed) // 2])
    assert refusal_of(tmp_path / f"x.jsonl{layer}").startswith(f"x.jsonl{layer} cannot be read: ")


def test_json_lines_in_a_json_file_and_one_object_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_bytes(as_jsonl(RECORDS))
    assert prompts_of(opened(tmp_path / "lines.json")) == TEXTS
    (tmp_path / "one.json").write_text(json.dumps({"data": RECORDS}, indent=1))
    assert refusal_of(tmp_path / "one.json") == "one.json holds neither an array of objects nor one object per line"
    (tmp_path / "one.json").write_text(json.dumps({"data": RECORDS}))
    assert refusal_of(tmp_path / "one.json").endswith("columns of one.json: 'data'")


def test_a_bad_element_of_an_array_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"prompt": "a"}, {"prompt": tru}, 3, {"prompt": "\xff"},\n {"prompt": "b"}]')
    rows = list(opened(tmp_path / "x.json"))
    assert [row.row_id for row in rows] == [f"x.json:{at}" for at in (1, 2, 3, 4, 5)]
    assert [row.error for row in rows] == [
        None,
        "element 2 of x.json is not valid JSON: Expecting value at character 12",
        "element 3 of x.json is not a JSON object",
        "element 4 of x.json is not valid UTF-8",
        None,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"', "the array is not closed; it ends within element 2"),
        ('[{"prompt": "a"}, {"prompt": "b}]', "the array is not closed; it ends within element 2"),
        ('[{"prompt": "a"}] {"prompt": "b"}', "something follows the array"),
        ("[]", "holds no rows"),
    ],
)
def test_an_array_that_is_not_whole_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert refusal_of(tmp_path / "x.json").endswith(message)


def test_bad_rows_of_a_csv_file_are_row_errors(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'prompt,key\r\nfine,1\n"a" b,2\nthree,3,3\n\n\xff,5\n,6\n5" wide,7\n"open,8\n')
    rows = list(opened(tmp_path / "x.csv"))
    assert [row.row_id for row in rows] == [f"x.csv:{line}" for line in (2, 3, 4, 6, 7, 8, 9)]
    assert [row.error for row in rows] == [
        None,
        "line 3 of x.csv is not valid: ',' expected after '\"'",
        "line 4 of x.csv has 3 fields, but the header has 2",
        "line 6 of x.csv is not valid UTF-8",
        "line 7 of x.csv: prompt is null",
        None,
        "line 9 of x.csv is not valid: a quote is not closed",
    ]
    assert rows[5].messages[0]["content"] == '5" wide'


def test_a_header_must_name_each_column_once(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,prompt\na,b\n")
    assert refusal_of(tmp_path / "x.csv").endswith("its header has the column 'prompt' twice")
    (tmp_path / "y.csv").write_text("prompt;id\na;b\n")
    assert refusal_of(tmp_path / "y.csv").endswith("columns of y.csv: 'prompt;id'")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    data=st.lists(
        st.sampled_from([b"prompt", b",", b'"', b"\n", b"[", b"]", b"{", b"}", b'{"prompt": "a"}', b"\xff", b"\\"])
    )
)
def test_any_bytes_are_rows_or_one_line(tmp_path: Path, data: list[bytes]) -> None:
    for suffix in TEXT_BY_SUFFIX:
        path = tmp_path / f"x{suffix}"
        path.write_bytes(b"".join(data))
        source = opened_or_refused(path)
        if isinstance(source, str):
            assert source.isprintable()
            continue
        rows = list(source)
        assert len(rows) == source.num_rows
        assert list(source.read_rows(0, len(rows) // 2, len(rows))) == rows[len(rows) // 2 :]


def test_a_folder_names_what_it_does_not_read(tmp_path: Path) -> None:
    for name in ("b.jsonl.gz", "a.csv", "c.arrow"):
        make = TEXT_BY_SUFFIX.get(Path(name.removesuffix(".gz")).suffix) or TABLES[Path(name).suffix]
        data = make(RECORDS)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for name in ("README.md", "d.jsonl.zip", "e.parquet.gz", "_f.jsonl", "_SUCCESS", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    (tmp_path / "_commits").mkdir()
    source = opened(tmp_path)
    assert prompts_of(source) == [*TEXTS, *TEXTS, *TEXTS]
    assert source.not_read == ("README.md", "_f.jsonl", "d.jsonl.zip", "e.parquet.gz", "more/")


def test_a_folder_with_nothing_to_read_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_jsonl(tmp_path / "train/a.jsonl", RECORDS)
    assert refusal_of(tmp_path).endswith(
        f"it holds 'train/'; a pattern such as {tmp_path}/**/*.jsonl reads subfolders"
    )


@pytest.mark.parametrize("name", ["x.parquet.gz", "x.arrow.zst", "x.jsonl.zip", "x.tar"])
def test_what_must_be_decompressed_first_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert f"{name} must be decompressed first" in refusal_of(tmp_path / name)


def test_a_pattern_reads_what_matches_in_order(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a/x.jsonl", "a/deep/y.jsonl", "a/z.csv", "c[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(TEXT_BY_SUFFIX[Path(name).suffix]([{"key": "k", "prompt": name}]))
    assert prompts_of(opened(tmp_path / "**/*.jsonl")) == ["a/deep/y.jsonl", "a/x.jsonl", "b/x.jsonl", "c[1].jsonl"]
    assert [row.row_id for row in opened(tmp_path / "?/x.jsonl")] == ["a/x.jsonl:1", "b/x.jsonl:1"]
    assert prompts_of(opened(tmp_path / "c[1].jsonl")) == ["c[1].jsonl"]  # it exists as it is
    assert refusal_of(tmp_path / "*.parquet") == f"input.path: no file matches {tmp_path}/*.parquet"
    (tmp_path / "a/notes.txt").write_text("x")
    assert "must end in one of" in refusal_of(tmp_path / "a/*.*")


def test_a_pattern_reads_a_file_once_and_hidden_names_where_it_spells_them(tmp_path: Path) -> None:
    for name in (
        "run/part-0.jsonl",
        "run/_pairs/part-0.jsonl",
        "run/_failed/x.jsonl",
        "run/.tmp/x.jsonl",
        "_a.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(TEXT_BY_SUFFIX[".jsonl"]([{"prompt": name}]))
    (tmp_path / "run/_commits").mkdir()
    (tmp_path / "run/_commits/notes.txt").write_text("x")
    for pattern in ("**/*.jsonl", "**/**/*.jsonl", "run/**/*.*", "*/*.jsonl"):
        source = opened(tmp_path / pattern)
        assert prompts_of(source) == ["run/part-0.jsonl"]
    assert opened(tmp_path / "**/*.jsonl").not_read == (
        "_a.jsonl",
        "run/_failed/x.jsonl",
        "run/_pairs/part-0.jsonl",
    )
    assert prompts_of(opened(tmp_path / "**/_pairs/*.jsonl")) == ["run/_pairs/part-0.jsonl"]
    assert prompts_of(opened(tmp_path / "run/_[fp]*/*.jsonl")) == ["run/_failed/x.jsonl", "run/_pairs/part-0.jsonl"]
    assert prompts_of(opened(tmp_path / "run/_pairs/*.jsonl")) == ["run/_pairs/part-0.jsonl"]
    assert "no file matches" in refusal_of(tmp_path / "?a.jsonl")
    assert "which a pattern must spell: '_a.jsonl'" in refusal_of(tmp_path / "?a.jsonl")


def test_a_saved_data_set_is_read_in_its_own_order(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(RECORDS)
    data.select(range(9)).shuffle(seed=1).save_to_disk(str(tmp_path / "one"), num_shards=3)
    expected = list(datasets.load_from_disk(str(tmp_path / "one"))["prompt"])
    assert expected != TEXTS
    (tmp_path / "one/cache-1.arrow").write_bytes(b"of datasets itself")
    assert prompts_of(opened(tmp_path / "one")) == expected
    (tmp_path / "one/data-00001-of-00003.arrow").unlink()
    assert "is not a whole data set of save_to_disk" in refusal_of(tmp_path / "one")


def test_a_saved_data_set_of_several_splits_is_read_by_split(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(RECORDS)
    splits = datasets.DatasetDict({"train": data.select([0, 1]), "test": data.select([2])})
    splits.save_to_disk(str(tmp_path / "all"))
    source = opened(tmp_path / "all")
    assert prompts_of(source) == TEXTS[:2]
    assert source.not_read == ("test/",)
    assert prompts_of(opened(tmp_path / "all", split="test")) == TEXTS[2:3]
    assert refusal_of(tmp_path / "all", split="dev").endswith("has no split 'dev'; splits: test, train")


REPOSITORY = """---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/train.jsonl}
  - {split: test, path: "plain/test-*.jsonl.gz"}
- config_name: table
  data_files:
  - {split: train, path: table/*.jsonl}
---
# A data set
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a repository of the hub is laid out: configurations in the card's head, no script."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    (folder / "plain").mkdir(parents=True)
    (folder / "table").mkdir()
    (folder / "README.md").write_text(REPOSITORY)
    write_jsonl(folder / "plain/train.jsonl", RECORDS[:3])
    with gzip.open(folder / "plain/test-0.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in RECORDS[3:5]))
    write_jsonl(folder / "table/0.jsonl", RECORDS[5:7])
    return folder


@pytest.mark.parametrize(
    ("fields", "expected", "name"),
    [
        ({}, TEXTS[:3], "repository:train"),
        ({"split": "test"}, TEXTS[3:5], "repository:test"),
        ({"subset": "plain", "split": "test"}, TEXTS[3:5], "repository:plain:test"),
        ({"subset": "table"}, TEXTS[5:7], "repository:table:train"),
    ],
)
def test_a_data_set_is_read_by_configuration_and_split(
    repository: Path, fields: dict[str, str], expected: list[str], name: str
) -> None:
    source = opened(f"datasets:{repository}", id="key", **fields)
    assert prompts_of(source) == expected
    assert source.files[0].name == name
    assert [row.row_id for row in source] == [f"k{TEXTS.index(text)}" for text in expected]
    if fields:  # a folder of which a configuration or a split is asked needs no word before it
        assert prompts_of(opened(repository, **fields)) == expected
    plan = make_plan(make_config(f"datasets:{repository}", repository.parent / "run", input=fields))
    again = Plan.from_json(plan.to_json())
    assert [row.messages[0]["content"] for shard in again.shards for row in again.read_shard(shard)] == expected


def test_a_configuration_or_split_that_is_not_there_is_refused_with_those_that_are(repository: Path) -> None:
    assert "plain" in refusal_of(repository, subset="other")
    assert "table" in refusal_of(repository, subset="other")
    assert "train" in refusal_of(repository, split="dev", subset="plain")
    assert "is no name of a data set and no folder" in refusal_of("datasets:./nothing/here/at all")


def test_a_split_of_files_that_have_none_is_refused(tmp_path: Path, repository: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", RECORDS)
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    for path in (file, tmp_path / "*.jsonl", tmp_path / "saved"):
        assert f"input.split has no effect on {path}" in refusal_of(path, split="test")
        assert f"input.subset has no effect on {path}" in refusal_of(path, subset="plain")


def test_a_run_s_pairs_are_a_configuration_of_its_folder(tmp_path: Path) -> None:
    """The folder of a run says to `datasets` which of its files are what."""
    (tmp_path / "run/_pairs").mkdir(parents=True)
    (tmp_path / "run/.huggingface.yaml").write_text(
        "configs:\n"
        "- {config_name: default, data_files: [{split: train, path: part-*.parquet}]}\n"
        "- {config_name: pairs, data_files: [{split: train, path: _pairs/part-*.parquet}]}\n"
    )
    pq.write_table(pa.Table.from_pylist(RECORDS[:4]), tmp_path / "run/part-0.parquet")
    pq.write_table(pa.Table.from_pylist(RECORDS[4:5]), tmp_path / "run/_pairs/part-0.parquet")
    assert prompts_of(opened(tmp_path / "run", subset="pairs")) == TEXTS[4:5]


def test_the_first_version_of_feather_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.feather").write_bytes(b"FEA1" + b"\0" * 64)
    assert "it has Feather's first version" in refusal_of(tmp_path / "x.feather")


def test_uuids_are_ids_in_arrow_and_in_text(tmp_path: Path) -> None:
    ids = [uuid.UUID(int=at * 2**64 + 7) for at in range(3)]
    table = pa.table({"id": pa.array([each.bytes for each in ids], pa.uuid()), "prompt": ["a", "b", "c"]})
    for has_arrow_schema in (True, False):
        pq.write_table(table, tmp_path / "x.parquet", store_schema=has_arrow_schema)
        assert [row.row_id for row in opened(tmp_path / "x.parquet", id="id")] == list(map(str, ids))
    write_jsonl(tmp_path / "x.jsonl", [{"id": str(each), "prompt": "a"} for each in ids])
    assert [row.row_id for row in opened(tmp_path / "x.jsonl", id="id")] == list(map(str, ids))


def test_whole_numbers_that_pandas_made_floats_are_refused_with_the_reason(tmp_path: Path) -> None:
    pd.DataFrame({"id": [1, None, 3], "prompt": ["a", "b", "c"]}).to_parquet(tmp_path / "x.parquet")
    message = refusal_of(tmp_path / "x.parquet", id="id")
    assert message.startswith(
        "the column id of x.parquet has type double; it must hold text or whole numbers (or UUIDs); "
    )
    assert "pandas makes floats of whole numbers where one is missing" in message


def test_weights_may_be_json_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('prompt,w\na,"{""kind"": 0.5}"\nb,\nc,kind\nd,3\n')
    rows = list(open_input(InputConfig(path=str(tmp_path / "x.csv"), weights="w"), ("kind",)))
    assert [row.weights for row in rows] == [{"kind": 0.5}, None, {"kind": None}, {"kind": None}]
    assert [row.error for row in rows] == [
        None,
        None,
        "line 4 of x.csv: weights must be an object {principal: number} or its JSON text; got 'kind'",
        "line 5 of x.csv: weights must be an object {principal: number}; got 3",
    ]


@pytest.mark.parametrize("suffix", [*TEXT_BY_SUFFIX, *TABLES])
def test_a_prompt_of_ten_megabytes_is_a_row_error(tmp_path: Path, suffix: str) -> None:
    make = {**TEXT_BY_SUFFIX, **TABLES}[suffix]
    records = [{"key": "a", "prompt": "x" * 10**7}, {"key": "b", "prompt": "fine"}]
    (tmp_path / f"x{suffix}").write_bytes(make(records))
    large, fine = opened(tmp_path / f"x{suffix}", id="key")
    assert str(large.error).endswith("the conversation has 10,000,000 characters; at most 8,388,608 are read")
    assert fine.error is None


PEAK = """
import resource, sys
from pipeline.config.sections import InputConfig
from pipeline.inputs.source import open_input

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

source = open_input(InputConfig(path=sys.argv[1]))
before = peak()
assert sum(len(row.messages[0]["content"]) for row in source) == int(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.parametrize(("num_rows", "length"), [(300, 2**20), (150_000, 2048)])
def test_a_row_group_of_three_hundred_megabytes_is_read_in_flat_memory(
    tmp_path: Path, num_rows: int, length: int
) -> None:
    with pq.ParquetWriter(
        tmp_path / "x.parquet", pa.schema([("prompt", pa.string())]), use_dictionary=False, compression="none"
    ) as writer:
        writer.write_table(pa.table({"prompt": ["x" * length] * num_rows}), row_group_size=num_rows)
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.parquet"), str(num_rows * length)]
    grown_mib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown_mib < 150
