"""The report of a run as a file: what it says, that it says the same twice, and that data stays data."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.commands import cage
from support.reports import ATTACK, GRID, HOSTILE, add_evaluation, make_run, metrics_of
from support.storage import PRINCIPALS, s3_server

from jobs.commands.report import run_report
from pipeline.errors import ConfigurationError, StorageError
from pipeline.reporting.columns import data_files, read_batches
from pipeline.reporting.comparison import table_of
from pipeline.reporting.dataset import describe_dataset
from pipeline.reporting.metrics import parse_metrics
from pipeline.reporting.page import render_report, write_report
from pipeline.reporting.tally import Tally, tally
from pipeline.reporting.text import embeddable, visible
from pipeline.storage.run import Run


class Page(HTMLParser):
    """The elements and the text of a page, with the content of its scripts apart."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run over a grid, judged."""
    folder = tmp_path_factory.mktemp("evaluated")
    run = make_run(folder, grid=GRID, decoding={"trace": "tokens", "n": 2})
    add_evaluation(run, folder / "run")
    return run


def rows_of(run: Run) -> list[dict]:
    folder = Path(run.store.path)
    return [row for file in sorted(folder.glob("part-*")) for row in pq.read_table(file).to_pylist()]


def numbers_of(run: Run, **options: int) -> Tally:
    batches = (batch for file in data_files(run) for batch in read_batches(run, file, rule="equilibrium"))
    return tally(batches, run.plan.principal_names, **options)


def test_the_page_is_one_file_that_needs_nothing_else(evaluated):
    page = Page(render_report(evaluated))
    assert all(address == "data:," or address.startswith("#") for address in page.addresses)
    assert page.tags["script"] == 2
    assert page.tags["style"] == 1
    assert not page.attributes & {"style", "onclick", "onload", "srcset"}  # the policy of the page would block them
    assert json.loads(page.scripts[0])["comparison"]["objectives"][0] == "vader"


def test_the_same_files_give_the_same_bytes(evaluated, tmp_path):
    shutil.copytree(evaluated.store.path, tmp_path / "run")
    assert render_report(Run.open(str(tmp_path / "run"))) == render_report(evaluated)


def test_what_comes_from_outside_is_shown_as_text(evaluated, tmp_path):
    for run, texts in (
        (make_run(tmp_path), HOSTILE),
        (evaluated, [f"a note {ATTACK}", f"no answer: {ATTACK}", f"nothing is told apart {ATTACK}"]),
    ):
        raw = render_report(run)
        page = Page(raw)
        for text in texts:
            assert visible(text) in page.text
        assert page.tags["img"] == 0
        assert not set("\x1b\x07\x00\u202e\u202c\u2066\u2069") & set(raw.decode())
    assert visible(HOSTILE[5]).startswith("right to left \\u202etxt.exe\\u202c")
    assert json.loads(page.scripts[0])["comparison"]["objectives"][1] == ATTACK


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_json_cannot_end_its_script(text):
    embedded = embeddable({"name": [text, float("nan"), 0.1]})
    assert not set("<>&\n") & set(embedded)
    assert json.loads(embedded) == {"name": [visible(text), None, 0.1]}


def test_means_extremes_and_shares_are_those_of_the_rows(evaluated):
    rows, found = rows_of(evaluated), numbers_of(evaluated)
    assert list(found.by_rule) == ["equilibrium", "linear", "base"]
    for rule, summary in found.by_rule.items():
        own = [row for row in rows if row["rule"] == rule]
        assert summary.rows == len(own)
        assert summary.mean("kl_per_token") == pytest.approx(np.mean([row["kl_per_token"] for row in own]))
        assert summary.highs["max_residual"] == max(row["max_residual"] for row in own)
        assert summary.sums["num_tokens"] == sum(row["num_tokens"] for row in own)
        rewards = [row["rewards"]["kind-1"] for row in own]
        assert summary.mean("rewards.kind-1") == pytest.approx(np.mean(rewards))
        assert sorted(found.sample.values(rule, "rewards.kind-1")) == sorted(rewards)
        assert (summary.mean("payments.brief") is None) == (rule != "equilibrium")


def test_the_best_and_the_worst_rows_are_found_wherever_they_are(evaluated):
    rows, found = rows_of(evaluated), numbers_of(evaluated)
    totals = sorted(sum(row["weights"][name] * row["rewards"][name] for name in PRINCIPALS) for row in rows)
    best, worst = found.by_total.ends()
    assert [place.score for place in best] == pytest.approx(totals[:-4:-1])
    assert [place.score for place in worst] == pytest.approx(totals[:3])
    lowest = sorted(min(row["rewards"].values()) for row in rows)
    assert found.by_worst.ends()[0][0].score == pytest.approx(lowest[-1])


def test_rules_are_contrasted_at_equal_terms(evaluated):
    rows, found = rows_of(evaluated), numbers_of(evaluated)

    def terms(row):
        return row["row_id"], row["sample"], row["agent_temperature"], tuple(row["weights"].values())

    linear = {terms(row): min(row["rewards"].values()) for row in rows if row["rule"] == "linear"}
    ours = [row for row in rows if row["rule"] == "equilibrium"]
    gains = sorted(min(row["rewards"].values()) - linear[terms(row)] for row in ours)
    best, worst = found.by_contrast.ends()
    assert [place.score for place in (*worst, *best)] == pytest.approx([*gains[:3], *gains[:-4:-1]])
    for place in (*best, *worst):
        table = pq.read_table(Path(evaluated.store.path) / place.file)
        first, second = (table.slice(at, 1).to_pylist()[0] for at in (place.index, place.partner))
        assert (first["rule"], second["rule"]) == ("equilibrium", "linear")
        assert terms(first) == terms(second)


def test_the_sample_is_of_the_run_not_of_its_files(tmp_path):
    chosen = []
    for rows_per_shard in (2, 50):
        (tmp_path / str(rows_per_shard)).mkdir()
        run = make_run(tmp_path / str(rows_per_shard), num_rows=41, rows_per_shard=rows_per_shard)
        result = numbers_of(run, sampled_rows=10)
        assert result.rows == 40
        chosen.append(sorted(result.sample.values("equilibrium", "rewards.brief")))
    assert len(chosen[0]) == 10
    assert chosen[0] == chosen[1]


def test_how_many_of_how_many_is_reported(tmp_path):
    page = Page(render_report(make_run(tmp_path, num_rows=20), sampled_rows=5))
    assert "Drawn from 5 of 19 answers" in page.text
    assert "Best 3 of 19" in page.text
    assert "6 of 19 answers, chosen by a hash" in page.text


def test_a_run_without_trace_principals_or_answers_has_a_report_too(tmp_path):
    (tmp_path / "plain").mkdir()
    run = make_run(tmp_path / "plain", decoding={"trace": "none"})
    page = Page(render_report(run))
    assert "Best 3 of 6" in page.text
    assert "Who paid for which token" not in page.text
    (tmp_path / "alone").mkdir()
    alone = Page(render_report(make_run(tmp_path / "alone", principals={})))
    assert "Who paid how much" not in alone.text
    assert "6 of 6 answers, chosen by a hash" in alone.text
    for name in ("_SUCCESS", "_manifest.json"):
        (tmp_path / "plain/run" / name).unlink()
    for commit in (tmp_path / "plain/run/_commits").iterdir():
        commit.unlink()
    empty = Page(render_report(Run.open(str(tmp_path / "plain/run"))))
    assert "not complete" in empty.text
    assert "No answers are committed yet" in empty.text


@pytest.mark.parametrize(
    "wrong", [None, 3, "text", [1], {"a": 1}, [{"a": {"b": [None]}}], float("nan"), pytest.param(10**400, id="huge")]
)
def test_metrics_of_any_shape_are_shown_as_far_as_they_go(evaluated, wrong):
    whole = metrics_of(evaluated)
    for key in whole:
        parse_metrics({**whole, key: wrong})
        parse_metrics({name: value for name, value in whole.items() if name != key})
    for key in whole["points"][0]:
        (point,) = parse_metrics({"points": [{**whole["points"][0], key: wrong}]}).points
        assert (dict(point.weights) == whole["points"][0]["weights"]) == (key != "weights")


def test_tables_put_intervals_below_their_numbers_and_align_decimals():
    entries = [
        {"rule": "linear", "mip": 1, "mip_interval": [0.5, 1.75], "none": None, "objectives": {"kind": 0.125}},
        {"rule": "base", "mip": 0.25, "mip_interval": None, "none": None, "objectives": {"kind": None}},
    ]
    table = table_of(entries)
    assert table["head"] == ["rule", "mip", "kind"]
    assert [[cell["text"] for cell in row] for row in table["rows"]] == [
        ["linear", "1.00", "0.125"],
        ["base", "0.25", "\N{EN DASH}"],
    ]
    assert [row[1]["interval"] for row in table["rows"]] == ["0.50 to 1.75", None]


def test_a_page_is_made_of_metrics_with_parts_missing(tmp_path):
    run = make_run(tmp_path, grid=GRID)
    whole = metrics_of(run)
    for kept in ([], ["points"], ["rules", "win_rates", "judges", "notes"]):
        tree = {key: whole[key] for key in kept}
        (tmp_path / "run/_metrics.json").write_text(json.dumps(tree))
        assert "Comparison of rules" in Page(render_report(run)).text
    (tmp_path / "run/_metrics.json").write_text("[1,")
    with pytest.raises(StorageError, match=r"metrics\.json is not a JSON object"):
        render_report(run)


def test_a_data_set_is_shown_with_what_was_dropped(tmp_path):
    run = make_run(tmp_path)
    manifest = {
        "answers": 24,
        "prompts": {"train": 5, "validation": 1},
        "sft": {"rows": {"train": 4, "validation": 1}, "answers_used": 6, "answers_dropped": {ATTACK: 18}},
        "histograms": {
            "sft.score": {"edges": [0.0, 0.5, 1.0], "counts": [1, 4], "quantiles": [0.0, 0.1, 0.6, 0.9, 1.0]}
        },
    }
    (tmp_path / "run/_dataset").mkdir()
    (tmp_path / "run/_dataset/manifest.json").write_text(json.dumps(manifest))
    page = Page(render_report(run))
    shown = " ".join(page.text.split())
    assert "Made from 24 answers to 5 prompts for train, 1 prompts for validation" in shown
    assert f"dropped: {ATTACK}18 75.0 %" in shown
    assert json.loads(page.scripts[0])["charts"]["dataset.sft.score"]["groups"][0]["counts"] == [1, 4]
    for key, wrong in (
        (key, wrong) for key in manifest for wrong in (None, 3, "x", [1], {"a": [1]}, {"sft": {"edges": 1}})
    ):
        (tmp_path / "run/_dataset/manifest.json").write_text(json.dumps({**manifest, key: wrong}))
        assert describe_dataset(run) is not None
    (tmp_path / "run/_dataset/manifest.json").write_text("no")
    with pytest.raises(StorageError, match=r"dataset/manifest\.json is not a JSON object"):
        render_report(run)


def test_a_report_is_written_into_an_object_store(tmp_path):
    import fsspec

    with s3_server():
        fsspec.filesystem("s3").mkdir("bucket")
        run = make_run(tmp_path, path="s3://bucket/run")
        assert write_report(Run.open("s3://bucket/run")) == "s3://bucket/run/_report.html"
        assert run.store.read("_report.html") == render_report(run)


def test_the_command_writes_where_it_is_reported(tmp_path):
    run = make_run(tmp_path)
    made = cage("report", run.store.path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == f"report: {tmp_path}/run/_report.html"
    run_report(run.store.path, str(tmp_path / "a page.html"))
    assert (tmp_path / "a page.html").read_bytes() == (tmp_path / "run/_report.html").read_bytes()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "there is no run"),
        (".", "must be a file"),
        ("/no/such/r.html", "/no/such does not"),
        ("s3://bucket", "in the bucket"),
    ],
)
def test_what_cannot_be_written_is_reported_before_anything_is_read(tmp_path, output, message):
    with pytest.raises(ConfigurationError, match=message):
        run_report(str(tmp_path), output)
