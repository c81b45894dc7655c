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

from jobs.commands import text as commands_text
from jobs.commands.report import run_report
from pipeline.errors import ConfigurationError, StorageError
from pipeline.reporting.columns import data_files, read_batches
from pipeline.reporting.comparison import describe_metrics, table_of
from pipeline.reporting.dataset import describe_dataset
from pipeline.reporting.existing import ALL, Lead
from pipeline.reporting.metrics import parse_metrics
from pipeline.reporting.page import render_report, write_report
from pipeline.reporting.tally import Tally, tally
from pipeline.reporting.text import decimal, embeddable, number, plain, visible
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
    batches = (batch for file in data_files(run) for batch in read_batches(run, file))
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
        (evaluated, [f"a note {ATTACK}", f"no answer: {ATTACK}", f"nothing is distinguishable {ATTACK}"]),
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
    totals, lowest = {}, {}
    for row in rows:
        weighted = sum(row["weights"][name] * row["rewards"][name] for name in PRINCIPALS)
        totals.setdefault(row["row_id"], []).append(weighted / sum(row["weights"].values()))
        lowest.setdefault(row["row_id"], []).append(
            min(row["rewards"][name] for name in PRINCIPALS if row["weights"][name])
        )
    for ranking, scores in ((found.by_total, totals), (found.by_worst, lowest)):
        best, worst = ranking.ends()
        # one answer of each prompt, its best or its worst
        assert [place.score for place in best] == pytest.approx(sorted(map(max, scores.values()))[:-4:-1])
        assert [place.score for place in worst] == pytest.approx(sorted(map(min, scores.values()))[:3])
        for places in (best, worst):
            assert len({place.row_id for place in places}) == 3


def test_weights_say_whose_reward_counts_and_do_not_scale_it(tmp_path):
    first, second = (
        make_run(
            tmp_path / str(factor),
            principals={
                name: {**section, "weight": factor * weight}
                for (name, section), weight in zip(PRINCIPALS.items(), (0.25, 0.75), strict=True)
            },
        )
        for factor in (1, 3)
        if not (tmp_path / str(factor)).mkdir()
    )
    chosen = [
        [place.score for places in numbers_of(run).by_total.ends() for place in places] for run in (first, second)
    ]
    assert chosen[0] == pytest.approx(chosen[1])


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run over rows with existing answers and weights of their own, two samples each."""
    folder = tmp_path_factory.mktemp("relabelled")
    return make_run(
        folder,
        num_rows=24,
        rows_per_shard=5,
        input={"response": "old", "weights": "w"},
        decoding={"trace": "none", "n": 2, "max_new_tokens": 33},
    )


def test_new_answers_are_compared_with_existing_ones_by_principal_and_by_weight(relabelled):
    rows = [row for row in rows_of(relabelled) if row["original_rewards"] is not None]
    leads = numbers_of(relabelled).leads["equilibrium"]
    for name in (*PRINCIPALS, ALL):
        by_prompt: dict[str, list[float]] = {}
        for row in rows:
            weights = row["weights"] if name == ALL else {name: 1.0}
            if not (total := sum(weights.values())):
                continue
            gain = sum(w * (row["rewards"][of] - row["original_rewards"][of]) for of, w in weights.items()) / total
            by_prompt.setdefault(row["row_id"], []).append(0.0 if row["chosen"] is None else gain)
        gains = np.array(list(by_prompt.values()))
        lead = leads[name]
        assert (lead.wins, lead.ties, lead.losses) == ((gains > 0).sum(), (gains == 0).sum(), (gains < 0).sum())
        assert lead.wins
        assert lead.ties
        assert lead.losses
        assert lead.mean == pytest.approx(gains.mean())
        # prompts have equally many answers, so the interval is that of a mean of prompts' means
        error = gains.mean(1).std(ddof=1) / np.sqrt(len(gains))
        assert lead.mean_interval() == pytest.approx((gains.mean() - 1.96 * error, gains.mean() + 1.96 * error))
        low, high = lead.win_interval()
        assert 0 <= low < (gains > 0).mean() < high <= 1


@pytest.mark.parametrize(
    ("wins", "losses", "interval"),
    [(8, 2, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 0, (0.7225, 1.0)), (1, 0, (0.2065, 1.0))],
)
def test_the_interval_of_a_share_of_wins_is_wilsons(wins, losses, interval):
    lead = Lead()
    gains = np.array([1.0] * wins + [-1.0] * losses)
    lead.add(gains, np.arange(len(gains)))
    assert lead.win_interval() == pytest.approx(interval, abs=1e-4)


def test_the_page_of_a_relabelling_has_the_comparison_the_cut_share_and_the_rows_weights(relabelled):
    rows = rows_of(relabelled)
    page = Page(render_report(relabelled))
    shown = " ".join(page.text.split())
    numbers = numbers_of(relabelled)
    compared = sum(row["original_rewards"] is not None for row in rows)
    assert f"{compared} of {len(rows)} answers have an existing answer" in shown
    for name, label in (("brief", "brief"), ("kind-1", "kind-1"), (ALL, "all, by weight")):
        lead = numbers.leads["equilibrium"][name]
        low, high = lead.win_interval()
        share = 100 * lead.wins / lead.answers
        assert f"{label}{share:.1f} %{100 * low:.1f} to {100 * high:.1f} {lead.wins}{lead.ties}{lead.losses}" in shown
    cut = sum(row["finish_reason"] == "length" for row in rows)
    assert f"{cut} of {len(rows)} answers ({100 * cut / len(rows):.0f} %) were cut at max_new_tokens (33" in shown
    assert "cut at max_new_tokens · " in shown
    assert " · length" not in shown
    weights = [row["weights"]["brief"] for row in rows]
    assert f"{min(weights):.2f} to {max(weights):.2f}, mean {np.mean(weights):.2f}; 1 where a row has none" in shown
    chart = json.loads(page.scripts[0])["charts"]["weights.brief"]
    assert sum(chart["groups"][0]["counts"]) == len(rows)


def test_a_run_without_existing_answers_or_cut_ones_has_no_word_of_them(tmp_path):
    plain = make_run(tmp_path, num_rows=2)
    text = Page(render_report(plain)).text
    assert "New answers against" not in text
    assert "Warning" not in text
    assert "weights of the rows" not in text


@pytest.mark.parametrize("value", [-0.0, -1e-12, -0.0004, 0.0])
def test_nothing_is_minus_zero(value):
    for shown in (number(value), decimal(value, 3), plain(value), commands_text.number(value)):
        assert float(shown.replace("\N{MINUS SIGN}", "-")) != 0 or "-" not in shown.replace("\N{MINUS SIGN}", "-")


def test_a_judge_of_which_less_is_better_is_named_so_everywhere(evaluated):
    tree = metrics_of(evaluated)
    tree["judges"]["vader"]["sign"] = "lower"
    labels = describe_metrics(parse_metrics(tree), list(PRINCIPALS))["data"]["labels"]
    assert labels["vader"] == "minus vader"
    assert labels[ATTACK] == f"{ATTACK} (minus vader)"
    assert labels["words"] == "words"


def test_rules_are_contrasted_at_equal_terms(evaluated):
    rows, found = rows_of(evaluated), numbers_of(evaluated)

    def terms(row):
        return row["row_id"], row["sample"], row["agent_temperature"], tuple(row["weights"].values())

    def lowest(row):
        return min(reward for name, reward in row["rewards"].items() if row["weights"][name])

    linear = {terms(row): lowest(row) for row in rows if row["rule"] == "linear"}
    gains: dict[str, list[float]] = {}
    for row in rows:
        if row["rule"] == "equilibrium":
            gains.setdefault(row["row_id"], []).append(lowest(row) - linear[terms(row)])
    best, worst = found.by_contrast.ends()
    assert [place.score for place in best] == pytest.approx(sorted(map(max, gains.values()))[:-4:-1])
    assert [place.score for place in worst] == pytest.approx(sorted(map(min, gains.values()))[:3])
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
    assert table["head"] == ["rule", "mean inner product (MIP)", "kind"]
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
