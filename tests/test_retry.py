"""`cage retry`: failed or mended rows take the place of those before, and readers see each row once."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import job, parts, run_job, write_prompts

from jobs.commands.status import describe_status
from pipeline.errors import ConfigurationError, ErrorBudgetExceeded, InputChanged, RunMismatch
from pipeline.inputs.source import open_input
from pipeline.stages.retry import Retry, retry
from pipeline.storage.run import Run


def rows_of(folder, pattern="part-*.parquet"):
    return [row for path in sorted(Path(folder).glob(pattern)) for row in pq.read_table(path).to_pylist()]


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def written(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def run_again(folder, *, out=None, **options):
    overrides = options.pop("overrides", [])
    asked = Retry(str(folder), overrides, options.pop("only", ()), options.pop("mended", None))
    return retry(asked, Path(folder).parent / "cache", out or io.StringIO(), **options)


GOOD = [{"id": f"r{at}", "prompt": "tell me " * (at % 4) + "x" * (at + 1)} for at in range(8)]
# null prompt; a broken line; a null id; an answered row that is mended later
BAD = [
    GOOD[0], {"id": "r1", "prompt": None}, GOOD[2], '{"id": "r3"\n',
    {"id": "r4", "prompt": "old"}, {"id": None, "prompt": GOOD[5]["prompt"]}, *GOOD[6:],
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The files of a run over the good rows."""
    folder = tmp_path_factory.mktemp("whole")
    config = job(written(folder / "prompts.jsonl", GOOD), folder / "run", tiny(), input={"keep": ["id"]})
    run_job(config, folder)
    return folder / "run"


@pytest.fixture
def bad(tiny, tmp_path):
    """The folder of a run over the bad rows."""
    prompts = written(tmp_path / "prompts.jsonl", BAD)
    run_job(job(prompts, tmp_path / "run", tiny(), errors={"budget": 3}, input={"keep": ["id"]}), tmp_path)
    return tmp_path / "run"


def test_a_mended_input_gives_the_rows_of_a_run_over_it(bad, whole, tmp_path):
    before = parts(bad)
    written(tmp_path / "prompts.jsonl", GOOD)
    out = io.StringIO()
    run, was_run = run_again(bad, mended=str(tmp_path / "prompts.jsonl"), out=out)
    assert was_run
    assert "4 rows were run again, in new revisions of 2 shards" in out.getvalue()
    assert rows_of(bad) == rows_of(whole)
    assert not rows_of(bad, "_failed/*.parquet")
    names = ["part-00000-of-00003.1.parquet", "part-00001-of-00003.1.parquet", "part-00002-of-00003.parquet"]
    assert list(parts(bad)) == names
    kept = {path.name: path.read_bytes() for path in (bad / "_superseded").glob("part-*")}
    assert kept == {name: before[name] for name in list(before)[:2]}
    assert not list((bad / "_revised").iterdir())
    assert run.is_complete
    manifest = json.loads((bad / "_manifest.json").read_bytes())
    assert [each["name"] for each in manifest["files"]] == names
    status = run.status()
    assert (status.rows_aligned, status.rows_failed, status.revised_shards, status.reruns) == (8, 0, 2, 4)
    assert "2 shards: 4 rows were run again (newest revision 1)" in describe_status(run)
    assert [run.find(row["id"])[0]["prompt"][0]["content"] for row in GOOD] == [row["prompt"] for row in GOOD]
    unchanged = files_of(bad)
    assert not run_again(bad, mended=str(tmp_path / "prompts.jsonl"))[1]
    assert files_of(bad) == unchanged


def test_an_input_that_was_mended_in_place_is_the_input_of_the_run(bad, whole, tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    config = job(prompts, bad, tiny(), errors={"budget": 3}, input={"keep": ["id"]})
    written(prompts, [*GOOD[:7], "\n", *GOOD[7:], {"id": "r8", "prompt": "x"}])
    with pytest.raises(InputChanged, match=r"cage retry RUN --input FILE"):
        run_job(config, tmp_path, may_extend=True)
    run_again(bad, mended=str(prompts))
    with pytest.raises(RunMismatch, match="add --extend"):
        run_job(config, tmp_path)
    run, _ = run_job(config, tmp_path, may_extend=True)
    assert rows_of(bad)[:8] == rows_of(whole)
    assert [row["row_id"] for row in rows_of(bad)] == [f"r{at}" for at in range(9)]
    assert not run_job(config, tmp_path)[1]
    assert run.plan.revision == 2
    assert "extended  from 8 to 9 prompts" in describe_status(run)
    written(prompts, [*GOOD, {"id": "r8", "prompt": "x"}])  # the same rows, written otherwise
    assert not run_again(bad, mended=str(prompts))[1]
    assert not run_job(config, tmp_path)[1]


def test_readers_that_know_nothing_of_runs_see_each_row_once_and_the_newest(bad, whole, tmp_path):
    mended = written(tmp_path / "prompts.jsonl", GOOD)
    run_again(bad, mended=str(mended))
    expected = {row["row_id"]: row["response"] for row in rows_of(whole)}
    found = {
        "pandas": pd.read_parquet(bad)[["row_id", "response"]].to_dict("records"),
        "pyarrow": pq.read_table(bad).to_pylist(),
        "datasets": datasets.load_dataset(str(bad), "default", split="train", cache_dir=str(tmp_path / "hf")),
        "an input": [
            {"row_id": row.row_id, "response": row.response}
            for row in open_input(_as_input(bad))
        ],
    }  # fmt: skip
    if importlib.util.find_spec("polars") is not None:
        import polars

        found["polars"] = polars.read_parquet(f"{bad}/*.parquet").to_dicts()
    if importlib.util.find_spec("duckdb") is not None:
        import duckdb

        rows = duckdb.sql(f"SELECT row_id, response FROM '{bad}/*.parquet'").fetchall()
        found["duckdb"] = [{"row_id": row_id, "response": response} for row_id, response in rows]
    for reader, rows in found.items():
        pairs = [(row["row_id"], row["response"]) for row in rows]
        assert len(pairs) == len(expected), reader
        assert dict(pairs) == expected, reader


def _as_input(folder):
    from pipeline.config.sections import InputConfig

    return InputConfig(path=str(folder), messages="prompt", id="row_id", response="response")


def test_a_few_mended_rows_in_a_file_of_their_own(bad, tmp_path):
    mended = written(tmp_path / "mended.jsonl", [GOOD[4], GOOD[1]])
    run, _ = run_again(bad, mended=str(mended))
    by_id = {row["row_id"]: row for row in rows_of(bad)}
    assert [by_id[name]["prompt"][0]["content"] for name in ("r1", "r4")] == [GOOD[1]["prompt"], GOOD[4]["prompt"]]
    assert {row["row_id"] for row in rows_of(bad, "_failed/*.parquet")} == {"prompts.jsonl:4", "prompts.jsonl:6"}
    assert (run.status().rows_aligned, run.status().rows_failed) == (6, 2)
    again = written(tmp_path / "mended.jsonl", [{"id": "r4", "prompt": "newer"}, GOOD[1]])
    run_again(bad, mended=str(again))
    names = [name for name in parts(bad) if name.startswith("part-00001")]
    assert names == ["part-00001-of-00003.2.parquet"]
    assert len(list((bad / "_superseded").glob("part-00001*"))) == 2
    assert Run.open(str(bad)).committed()[1].revision == 2


def test_a_run_over_its_budget_is_done_when_enough_is_mended(tiny, tmp_path):
    bad = [{**row, "prompt": None} if at > 2 else row for at, row in enumerate(GOOD[:6])]
    prompts = written(tmp_path / "prompts.jsonl", bad)
    run_job(job(prompts, tmp_path / "run", tiny(), errors={"budget": 3}), tmp_path)
    (tmp_path / "run/_SUCCESS").unlink()  # as if all shards were done when the budget ended the run
    config = job(prompts, tmp_path / "run", tiny(), errors={"budget": 1})
    with pytest.raises(ErrorBudgetExceeded, match=r"cage retry .*run --input FILE"):
        run_job(config, tmp_path)
    out = io.StringIO()
    run, _ = run_again(tmp_path / "run", mended=str(written(tmp_path / "some.jsonl", GOOD[3:4])), out=out)
    assert "2 answers have failed and errors.budget allows 1: mend more of them" in out.getvalue()
    assert not run.is_complete
    run, _ = run_again(tmp_path / "run", mended=str(written(tmp_path / "some.jsonl", GOOD[4:5])), out=out)
    assert run.is_complete
    assert (run.status().rows_aligned, run.status().rows_failed) == (5, 1)
    assert not run_job(config, tmp_path)[1]


def test_a_run_that_its_budget_ended_goes_on_with_the_mended_input(whole, tiny, tmp_path):
    options = {"errors": {"budget": 0}, "input": {"keep": ["id"]}}
    config = job(written(tmp_path / "prompts.jsonl", BAD), tmp_path / "run", tiny(), **options)
    with pytest.raises(ErrorBudgetExceeded):
        run_job(config, tmp_path)
    written(tmp_path / "prompts.jsonl", GOOD)
    run, _ = run_again(tmp_path / "run", mended=str(tmp_path / "prompts.jsonl"))
    assert run.pending()
    run, _ = run_job(config, tmp_path)
    assert rows_of(tmp_path / "run") == rows_of(whole)
    assert run.is_complete


def test_only_some_rows_of_a_mended_input(bad, tmp_path):
    mended = written(tmp_path / "prompts.jsonl", GOOD)
    run, _ = run_again(bad, mended=str(mended), only=["r4", "r3"])
    assert {row["row_id"] for row in rows_of(bad, "_failed/*.parquet")} == {"r1", "prompts.jsonl:6"}
    assert run.status().reruns == 2
    with pytest.raises(ConfigurationError, match="has no row of the id 'r99'"):
        run_again(bad, mended=str(mended), only=["r99"])


def test_rows_that_the_run_does_not_have_are_refused_or_named(bad, tmp_path):
    before = files_of(bad)
    with pytest.raises(ConfigurationError, match=r"1 rows of the mended input are not in .*: 'r77'"):
        run_again(bad, mended=str(written(tmp_path / "mended.jsonl", [{"id": "r77", "prompt": "x"}])))
    assert files_of(bad) == before
    out = io.StringIO()
    grown = written(tmp_path / "prompts.jsonl", [*GOOD, {"id": "r8", "prompt": "x"}])
    run_again(bad, mended=str(grown), out=out)
    assert "1 rows that the run does not have are left; --extend adds rows" in out.getvalue()
    assert len(rows_of(bad)) == 8


def test_a_mended_row_that_fails_again_says_why(bad, tmp_path):
    mended = written(tmp_path / "mended.jsonl", [{"id": "r1", "prompt": "  "}, {"id": "r2", "prompt": None}])
    run, _ = run_again(bad, mended=str(mended))
    failed = {row["row_id"]: row for row in rows_of(bad, "_failed/*.parquet")}
    assert failed["r1"]["error"] == "line 1 of mended.jsonl: prompt is empty"
    assert failed["r2"]["error"] == "line 2 of mended.jsonl: prompt is null"
    assert (failed["r2"]["input_file"], failed["r2"]["input_row"]) == ("mended.jsonl", 2)
    assert "r2" not in {row["row_id"] for row in rows_of(bad)}
    assert run.status().rows_failed == 4


def test_settings_that_change_results_have_no_place_in_a_run(bad, tiny, tmp_path):
    mended = written(tmp_path / "prompts.jsonl", GOOD)
    with pytest.raises(ConfigurationError, match=r"would differ in decoding\.seed"):
        run_again(bad, mended=str(mended), overrides=["decoding.seed=3"])
    run, was_run = run_again(bad, mended=str(mended), overrides=["cluster.slots=2"])
    assert was_run
    assert run.store.path == str(bad)


@pytest.fixture
def long_rows(tiny, tmp_path):
    """The folder of a run in which two rows do not fit, and the model in which they do."""
    rows = [{**row, "prompt": "x" * 100} if at in (1, 4) else row for at, row in enumerate(GOOD[:5])]
    written(tmp_path / "prompts.jsonl", rows)
    options = {"errors": {"budget": 2}, "input": {"keep": ["id"]}}
    run_job(job(tmp_path / "prompts.jsonl", tmp_path / "run", tiny(seed=3, context=64), **options), tmp_path)
    return tmp_path / "run", tiny(seed=3)


@pytest.mark.parametrize("input_is", ["there", "gone", "changed"])
def test_failed_rows_that_fit_now_get_the_answers_they_would_have_had(long_rows, input_is, tmp_path):
    folder, large = long_rows
    run_job(job(tmp_path / "prompts.jsonl", tmp_path / "whole", large, input={"keep": ["id"]}), tmp_path)
    expected = [row for row in rows_of(tmp_path / "whole") if row["row_id"] in ("r1", "r4")]
    before, out = files_of(folder), io.StringIO()
    if input_is == "gone":
        (tmp_path / "prompts.jsonl").unlink()
    elif input_is == "changed":
        write_prompts(tmp_path / "prompts.jsonl", 3)
    run, _ = run_again(folder, overrides=[f"base={large}"], out=out)
    assert run.store.path == f"{folder}-retry"
    assert ("as the run has stored them" in out.getvalue()) == (input_is != "there")
    assert rows_of(f"{folder}-retry") == expected
    assert expected[0]["id"] == "r1"  # a kept column
    assert {path: data for path, data in files_of(folder).items() if "_retries" not in path.parts} == before
    run_again(folder, overrides=[f"base={large}"])


def test_chosen_failed_rows_are_tried_alone(long_rows, tmp_path):
    folder, large = long_rows
    only, _ = run_again(folder, overrides=[f"base={large}"], only=["r4"])
    assert only.store.path.startswith(f"{folder}-retry-")
    assert [row["row_id"] for row in rows_of(only.store.path)] == ["r4"]
    with pytest.raises(ConfigurationError, match="no failed row that can be tried again of the id 'r0', 'no such'"):
        run_again(folder, only=["r1", "r0", "no such"])


@pytest.mark.parametrize("input_is", ["there", "gone"])
def test_a_row_that_fails_again_as_it_is_fails_in_a_new_revision(long_rows, input_is, tmp_path):
    folder, _ = long_rows
    before = rows_of(folder)
    if input_is == "gone":
        (tmp_path / "prompts.jsonl").unlink()
    run, _ = run_again(folder)
    assert run.store.path == str(folder)
    assert rows_of(folder) == before
    assert {row["row_id"]: (row["prompt"][0]["content"], row["id"]) for row in rows_of(folder, "_failed/*")} == {
        name: ("x" * 100, name) for name in ("r1", "r4")
    }
    assert (run.status().rows_failed, run.status().reruns) == (2, 2)


def test_rows_that_could_not_be_read_need_a_mended_input(bad):
    with pytest.raises(ConfigurationError, match=r"no failed row that can be tried again.* --input FILE"):
        run_again(bad)


def test_variants_existing_answers_and_pairs_are_revised_with_their_rows(tiny, tmp_path):
    def job_of(output, rows):
        prompts = written(tmp_path / f"{output}.jsonl", rows)
        grid = {"agent_temperatures": [0.5, 1.0]}
        sections = {"decoding": {"n": 2}, "grid": grid, "errors": {"budget": 8}, "input": {"response": "old"}}
        return job(prompts, tmp_path / output, tiny(), **sections)

    good = [{**row, "old": f"old {at}" if at != 2 else None} for at, row in enumerate(GOOD[:4])]
    bad = [good[0], {**good[1], "prompt": None}, {**good[2], "old": "another"}, good[3]]
    run_job(job_of("whole", good), tmp_path)
    run_job(job_of("run", bad), tmp_path)
    run_again(tmp_path / "run", mended=str(written(tmp_path / "mended.jsonl", good)))
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "run", "_pairs/*") == rows_of(tmp_path / "whole", "_pairs/*")
    assert len(list((tmp_path / "run/_pairs").iterdir())) == len(list((tmp_path / "whole/_pairs").iterdir()))


def test_a_batch_request_keeps_its_parameters_and_tools(tiny, tmp_path):
    tool = {"type": "function", "function": {"name": "weather"}}
    own = {"max_tokens": 3, "seed": 9, "stop": ["zzz"], "tools": [tool]}
    requests = [
        {"custom_id": name, "body": {"messages": [{"role": "user", "content": text}], **own}}
        for name, text in (("short", "hello"), ("long", "x" * 100))
    ]
    prompts = written(tmp_path / "requests.jsonl", requests)
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    small, large = tiny(seed=3, context=64), tiny(seed=3)

    def job_of(output, base):
        config = job(prompts, tmp_path / output, base, errors={"budget": 1}, input={"id": None})
        return config.model_copy(update={"base": config.base.model_copy(update={"chat_template": template})})

    run_job(job_of("run", small), tmp_path)
    again, _ = run_again(tmp_path / "run", overrides=[f"base.model={large}"])
    (found,) = rows_of(again.store.path)
    assert (found["row_id"], found["num_tokens"], json.loads(found["tools"])) == ("long", 3, [tool])
    run_job(job_of("whole", large), tmp_path)
    assert [row for row in rows_of(tmp_path / "whole") if row["row_id"] == "long"] == [found]
    prompts.unlink()
    with pytest.raises(ConfigurationError, match=r"requests\.jsonl: the input is gone .* only it has the parameters"):
        run_again(tmp_path / "run")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_mended_input_of_any_kind(kind, tiny, tmp_path):
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in GOOD[:4]]

    def write(path, rows):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path) if kind == "parquet" else table.to_pandas().to_csv(path, index=False)
        return path

    prompts = tmp_path / f"prompts.{kind}"
    write(prompts, [rows[0], {**rows[1], "prompt": None}, *rows[2:]])
    run_job(job(prompts, tmp_path / "run", tiny(), errors={"budget": 1}), tmp_path)
    run_again(tmp_path / "run", mended=str(write(prompts, rows)))
    run_job(job(prompts, tmp_path / "whole", tiny()), tmp_path)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


def test_a_table_with_more_rows_is_compared_row_by_row_and_then_extends_the_run(tiny, tmp_path):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(GOOD[:4]), path)
    config = job(path, tmp_path / "run", tiny())
    run_job(config, tmp_path)
    before = parts(tmp_path / "run")
    pq.write_table(pa.Table.from_pylist(GOOD), path)
    with pytest.raises(InputChanged, match="a table is compared as a whole"):
        run_job(config, tmp_path, may_extend=True)
    assert not run_again(tmp_path / "run", mended=str(path))[1]
    run_job(config, tmp_path, may_extend=True)
    assert [row["row_id"] for row in rows_of(tmp_path / "run")] == [row["id"] for row in GOOD]
    assert before.items() <= parts(tmp_path / "run").items()


def test_candidates_that_were_mended_are_other_content(tiny, tmp_path):
    rows = [{"id": f"r{at}", "prompt": "hello", "answers": ["a", "b"]} for at in range(3)]
    prompts = written(tmp_path / "prompts.jsonl", rows)
    own = {"input": {"candidates": "answers"}, "decoding": {"unit": "answer", "max_new_tokens": 4}}
    run_job(job(prompts, tmp_path / "run", tiny(), **own), tmp_path)
    rows[1] = {**rows[1], "answers": ["c", "d"]}
    _, was_run = run_again(tmp_path / "run", mended=str(written(tmp_path / "mended.jsonl", rows)))
    assert was_run
    assert [row["response"] in ("c", "d") for row in rows_of(tmp_path / "run")] == [False, True, False]


def test_tools_that_were_mended_are_other_content(tiny, tmp_path):
    def row(at, name):
        tool = {"type": "function", "function": {"name": name, "parameters": {}}}
        return {"id": f"r{at}", "prompt": "hello", "tools": [tool]}

    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    prompts = written(tmp_path / "prompts.jsonl", [row(at, "old") for at in range(3)])
    config = job(prompts, tmp_path / "run", tiny(), input={"tools": "tools"})
    run_job(config.model_copy(update={"base": config.base.model_copy(update={"chat_template": template})}), tmp_path)
    mended = written(tmp_path / "mended.jsonl", [row(at, "new" if at == 1 else "old") for at in range(3)])
    _, was_run = run_again(tmp_path / "run", mended=str(mended))
    assert was_run
    names = [json.loads(each["tools"])[0]["function"]["name"] for each in rows_of(tmp_path / "run")]
    assert names == ["old", "new", "old"]
