"""Any name that a principal may have is a name that every reader of Parquet can read, and no other is accepted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from support.storage import make_config, write_jsonl

from pipeline.errors import ConfigurationError
from pipeline.records import FinishReason, Record, TokenTrace
from pipeline.storage.plan import make_plan
from pipeline.storage.run import Run
from pipeline.stores.store import open_store

# words of the format itself, of SQL, of the output, and the edges of the rule
ACCEPTED = [
    *("list", "element", "item", "array", "key", "value", "key_value", "entries", "struct", "map", "bag"),
    *("array_element", "null", "NULL", "select", "true", "NaN", "row_id", "rewards", "chosen", "tokens"),
    *("A", "_", "_x", "a-b", "a--", "x1", "k" * 64),
]
REFUSED = [
    *(
        "",
        " ",
        "a b",
        " a",
        "a ",
        "a.b",
        ".",
        "a/b",
        "a,b",
        "a=b",
        "a;b",
        "{a}",
        "(a)",
        "a\tb",
        "a\nb",
        "a\n",
        "a\\b",
    ),
    *("'a'", '"a"', "`a`", "[0]", "0", "1a", "-a", "%41", "a:b", "a\x00", "\ud800", "k" * 65),
    *("\u00e9", "e\u0301", "\u65e5\u672c", "\u0430", "\uff41", "a\u200b", "\U0001f600", "\u0131", "\u212a"),
]


def principals(*names: str) -> dict[str, Any]:
    return {name: {"kind": "prompted", "principle": "be kind"} for name in names}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_readers_may_stumble_over_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="a principal's name has at most 64 letters"):
        make_config("x.jsonl", principals=principals(name))


@pytest.mark.parametrize("names", [("kind", "Kind"), ("a", "b", "A"), ("LIST", "list")])
def test_names_that_differ_in_case_alone_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="must differ in more than upper and lower case"):
        make_config("x.jsonl", principals=principals(*names))


def run_of(folder: Path, *names: str) -> tuple[Path, list[dict[str, float]]]:
    """A finished run of two answers, and their rewards."""
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    config = make_config(prompts, folder / "run", principals=principals(*names), decoding={"trace": "tokens"})
    run = Run.create_or_resume(open_store(str(folder / "run")), make_plan(config, {"base": "tiny@abc123"}))
    rewards = []
    for shard in run.plan.shards:
        records = []
        for row in run.plan.read_shard(shard):
            values = {name: len(rewards) + at / 8 for at, name in enumerate(names)}
            rewards.append(values)
            token = TokenTrace(1, "x", -1.0, -1.0, values, values)
            records.append(
                Record(
                    row.row_id, 0, row.messages, "x", FinishReason.STOP, 1, values, values, values, tokens=(token,)
                )
            )
        run.commit(shard, records)
    run.finish()
    return folder / "run", rewards


def with_polars(folder: Path) -> list[Any]:
    import polars

    return polars.read_parquet(f"{folder}/*.parquet")["rewards"].to_list()


def with_duckdb(folder: Path) -> list[Any]:
    import duckdb

    return [row[0] for row in duckdb.sql(f"SELECT rewards FROM '{folder}/*.parquet' ORDER BY row_id").fetchall()]


READERS = {
    "pyarrow": lambda folder: pq.read_table(folder)["rewards"].to_pylist(),
    "pyarrow.dataset": lambda folder: pyarrow.dataset.dataset(folder).to_table()["rewards"].to_pylist(),
    "pandas": lambda folder: list(pd.read_parquet(folder, columns=["row_id", "rewards"])["rewards"]),
    "datasets": lambda folder: datasets.load_dataset(
        str(folder), "default", split="train", cache_dir=f"{folder}.cache"
    )["rewards"][:],
    "polars": with_polars,
    "duckdb": with_duckdb,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_readers_find_the_values_under_their_names(tmp_path: Path, reader: str) -> None:
    if importlib.util.find_spec(reader.partition(".")[0]) is None:
        pytest.skip(f"{reader} is not installed")
    chosen = [name for name in ACCEPTED if name != "NULL"]  # it would be "null" once more
    folder, rewards = run_of(tmp_path, *chosen)
    assert READERS[reader](folder) == rewards


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_name_alone_is_read_by_the_oldest_rules_for_lists_too(tmp_path: Path, name: str) -> None:
    folder, rewards = run_of(tmp_path, name)
    table = pq.read_table(folder)
    assert table["rewards"].to_pylist() == rewards
    assert [token["payments"] for tokens in table["tokens"].to_pylist() for token in tokens] == rewards
    assert list(pd.read_parquet(folder)["rewards"]) == rewards
    for optional in ("polars", "duckdb"):
        if importlib.util.find_spec(optional) is not None:
            assert READERS[optional](folder) == rewards
