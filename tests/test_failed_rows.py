"""Failed rows keep their data: what the row was given, and where it stands in the input."""

from __future__ import annotations

import json
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import job, run_job

from jobs.commands.status import describe_status
from pipeline.inputs.given import GIVEN_LIMIT, given_text
from pipeline.storage.failed_rows import failed_of

USER = [{"role": "user", "content": "hello"}]
CONFIGURED = {"kind": 0.7, "brief": 0.4}
ROWS = [
    {"id": "good", "p": "hello", "w": {"kind": 2}, "a": "old"},
    {"id": "no prompt", "p": None, "w": {"kind": 2}, "a": "old"},
    {"id": "null weight", "p": "hello", "w": {"kind": None}, "a": "old"},
    {"id": "unknown principal", "p": "hello", "w": {"kind": 3, "nobody": 1}, "a": "old"},
    {"id": "weights are text", "p": "hello", "w": "much", "a": None},
    {"id": "bad answer", "p": "hello", "w": None, "a": 7},
    {"id": None, "p": "hello", "w": {"brief": 1}, "a": "old"},
    {"id": "too long", "p": "x" * 100, "w": {"kind": 2}, "a": "old"},
]
KEPT = {  # prompt, existing answer, weights
    "no prompt": ([], "old", {"kind": 2.0, "brief": 0.4}),
    "null weight": (USER, "old", {"kind": None, "brief": 0.4}),
    "unknown principal": (USER, "old", {"kind": 3.0, "brief": 0.4}),
    "weights are text": (USER, None, {"kind": None, "brief": None}),
    "bad answer": (USER, None, CONFIGURED),
    "prompts.jsonl:7": (USER, "old", {"kind": 0.7, "brief": 1.0}),
    "too long": ([{"role": "user", "content": "x" * 100}], "old", {"kind": 2.0, "brief": 0.4}),
}


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """A run over the rows, and a line that is none."""
    folder = tmp_path_factory.mktemp("failed")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"id": "cut"\n')
    columns = {"prompt": "p", "weights": "w", "response": "a"}
    run, _ = run_job(
        job(prompts, folder / "run", tiny(context=64), input=columns, errors={"budget": 8}), folder
    )  # fmt: skip
    failed = [row for path in sorted(folder.glob("run/_failed/*")) for row in pq.read_table(path).to_pylist()]
    return run, {row["row_id"]: row for row in failed}


def test_a_failed_row_has_its_prompt_its_answer_and_its_weights(ran):
    found = {
        name: (row["prompt"], row["original_response"], row["weights"])
        for name, row in ran[1].items() if name != "prompts.jsonl:9"
    }  # fmt: skip
    assert found == KEPT


def test_a_failed_row_has_its_place_and_what_it_was_given(ran):
    places = {row["row_id"]: (row["input_file"], row["input_row"]) for row in ran[1].values()}
    lines = {row["id"] or "prompts.jsonl:7": at for at, row in enumerate(ROWS, 1)} | {"prompts.jsonl:9": 9}
    assert places == {name: ("prompts.jsonl", line) for name, line in lines.items() if name != "good"}
    given = {name: row["given"] for name, row in ran[1].items()}
    assert given.pop("prompts.jsonl:9") == '{"id": "cut"'
    assert given.pop("too long") is None  # it could be read
    assert list(map(json.loads, given.values())) == ROWS[1:-1]


def test_rows_that_could_not_be_read_are_not_tried_again_as_they_are(ran):
    assert [row["row_id"] for _, rows in failed_of(ran[0]) for row in rows] == ["too long"]


def test_answers_have_no_column_of_failed_rows(ran):
    names = pq.read_schema(sorted((ran[0].store.folder).glob("part-*"))[0]).names
    assert not {"input_file", "input_row", "given"} & set(names)


def test_rows_of_tables_count_from_0(tiny, tmp_path):
    rows = [{"prompt": text, "day": date(2026, 1, 1)} for text in ("a", None, "b", "")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    config = job(tmp_path / "t.parquet", tmp_path / "run", tiny(), input={"id": None}, errors={"budget": 2})
    run_job(config, tmp_path)
    failed = [row for path in sorted((tmp_path / "run/_failed").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [(row["row_id"], row["input_row"]) for row in failed] == [("t.parquet:1", 1), ("t.parquet:3", 3)]
    assert [row["given"] for row in failed] == ['{"prompt": null}', '{"prompt": ""}']


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"a": date(2026, 1, 2), "b": b"\xff"}, '{"a": "2026-01-02", "b": "b\'\\\\xff\'"}'),
        ({"a": "\ud800"}, '{"a": "\\ud800"}'),
        (b"\xff{", "\\xff{"),
        (b"x" * (GIVEN_LIMIT + 5), "x" * GIVEN_LIMIT),
    ],
)
def test_any_value_is_kept_as_text(given, text):
    assert given_text(given) == text


def test_weights_that_are_all_0_are_counted(tiny, tmp_path):
    rows = [{"id": f"r{at}", "prompt": "hello", "w": {"kind": at % 2, "brief": 0}} for at in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, _ = run_job(job(tmp_path / "prompts.jsonl", tmp_path / "run", tiny(), input={"weights": "w"}), tmp_path)
    assert run.status().unsteered == 3
    assert "warning   the weights of 3 answers are all 0: no principal steered them" in describe_status(run)
