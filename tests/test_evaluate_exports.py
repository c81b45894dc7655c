"""Files and trackers that take the results of an evaluation, and numbers of answers that no judge gives."""

from __future__ import annotations

import csv
import io
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest

from jobs.commands.evaluate import _as_csv, _as_latex, run_evaluate
from jobs.commands.exports import escaped
from pipeline.errors import ConfigurationError
from pipeline.evaluation.answers import NUMBERS, as_numbers
from pipeline.evaluation.trackers import Tracker, log_evaluation, named_numbers, open_tracker


def entry(**values):
    return {"num_points": 2, "unit": "token", "hypervolume": 0.5, "hypervolume_interval": [0.4, 0.6], **values}


RULE = entry(
    normalised_hypervolume=0.1, mip=0.25, mip_interval=None, worst_principal=0.2, kl_per_token=1.5, num_tokens=9.0
)
POINT = {
    "rule": "linear (answer)", "unit": "answer", "agent_temperature": 0.1, "weights": {"a_b": 1.0}, "variant": 0,
    "uses_temperature": True,
    "objectives": {"a_b": 0.7, "kl_per_token": 3.0}, "intervals": {"a_b": [0.6, 0.8], "kl_per_token": [2, 4]},
    "kl_per_token": 1.5, "scores": {"words": 4.0}, "score_intervals": {"words": [3.5, 4.5]},
}  # fmt: skip
METRICS = {
    "run": "abc", "objectives": ["a_b"], "judges": {"words": {}}, "num_prompts": 5, "num_answers": 10,
    "reference_point": {"a_b": 0.0},
    "rules": {"linear (answer)": RULE, "base": RULE},
    "by_temperature": [{"rule": "linear (answer)", "agent_temperature": 0.1, **RULE}],
    "points": [POINT],
    "equal_kl": [
        {"rule": "base", "unit": "token", "weights": {"a_b": 1.0}, "kl_per_token": 0.5, "objectives": {"a_b": 0.2},
         "weighted": 0.2},
    ],
    "control": [
        {"rule": "linear (answer)", "agent_temperature": 0.1, "principal": "a_b", "objective": "a_b", "spearman": 0.9,
         "is_monotone": True, "monotone_share": 1.0, "sparsity": None},
    ],
    "win_rates": [
        {"rule": "base", "against": "linear (answer)", "objective": "a_b", "agent_temperature": 0.1, "wins": 3,
         "ties": 1, "losses": 1},
    ],
    "differences": [
        {"rule": "base", "against": "linear (answer)", "metric": "mip", "agent_temperature": 0.1, "difference": -0.5,
         "interval": [-0.6, -0.4], "p": 0.01, "p_adjusted": 0.02, "prompts_for_this_difference": 7},
    ],
}  # fmt: skip


def test_the_csv_has_a_line_per_number_with_its_interval():
    rows = list(csv.DictReader(io.StringIO(_as_csv(METRICS))))
    found = {(row["table"], row["rule"], row["name"]): row for row in rows}
    row = found["rules", "linear (answer)", "hypervolume"]
    assert (row["value"], row["low"], row["high"], row["unit"]) == ("0.5", "0.4", "0.6", "token")
    assert found["by_temperature", "linear (answer)", "mip"]["agent_temperature"] == "0.1"
    assert found["by_temperature", "linear (answer)", "mip"]["low"] == ""
    row = found["points", "linear (answer)", "objectives.a_b"]
    assert (row["value"], row["high"], json.loads(row["weights"])) == ("0.7", "0.8", {"a_b": 1.0})
    # a principal may be called as a metric is
    assert found["points", "linear (answer)", "objectives.kl_per_token"]["low"] == "2"
    row = found["points", "linear (answer)", "kl_per_token"]
    assert (row["value"], row["low"]) == ("1.5", "")
    assert found["points", "linear (answer)", "scores.words"]["high"] == "4.5"
    row = found["equal_kl", "base", "objectives.a_b"]
    assert (row["value"], row["at_kl"]) == ("0.2", "0.5")  # of several levels of KL
    assert found["points", "linear (answer)", "scores.words"]["at_kl"] == ""
    assert found["control", "linear (answer)", "spearman"]["objective"] == "a_b"
    assert found["control", "linear (answer)", "is_monotone"]["value"] == "True"
    assert found["win_rates", "base", "wins"]["against"] == "linear (answer)"
    row = found["differences", "base", "mip"]
    assert (row["value"], row["low"], row["p_adjusted"], row["against"]) == (
        "-0.5",
        "-0.6",
        "0.02",
        "linear (answer)",
    )
    assert not any(row["name"].endswith("_interval") for row in rows)


def test_the_latex_table_has_every_rule_and_escapes_names():
    text = _as_latex(METRICS)
    assert text.startswith("\\begin{tabular}{lcccccccc}\n\\toprule\n")
    assert text.count(r"\\") == 4  # a head and three rules
    assert "base all & 0.50" in text
    assert "0.400 to 0.600" in text


def test_latex_prints_every_name_as_it_is():
    assert escaped("a_b 50% & #1 {x} $ ~ ^ \\ <é|ж>\n\nc") == (
        r"a\_b 50\% \& \#1 \{x\} \$ \textasciitilde{} \textasciicircum{} \textbackslash{} "
        r"\textless{}é\textbar{}ж\textgreater{} c"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ["found.xml"]}, r"--output must end with \.json, \.csv, \.tex; got found\.xml"),
        ({"log_to": "tensorboard"}, "--log-to must be mlflow or wandb; got tensorboard"),
        ({"log_to": "wandb"}, "--log-to wandb needs the package wandb: install cage-align with the extra `wandb`"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch, options, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    outputs = [tmp_path.__class__(name) for name in options.pop("outputs", [])]
    with pytest.raises(ConfigurationError, match=message):
        run_evaluate(tmp_path / "none.yaml", [], print_config=False, is_verbose=False, outputs=outputs, **options)


class RecordingMlflow:
    """What the functions of mlflow that are called were given."""

    def __init__(self):
        self.calls = []

    def start_run(self, run_name):
        self.calls.append(("start_run", run_name))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.calls.append(("end", error[0]))

    def __getattr__(self, name):
        return lambda *values: self.calls.append((name, *values))


def test_mlflow_gets_settings_numbers_and_the_whole_file():
    mlflow = RecordingMlflow()
    log_evaluation(Tracker.MLFLOW, mlflow, METRICS, name="run")
    names = [call[0] for call in mlflow.calls]
    assert names == ["set_experiment", "start_run", "log_params", "log_metrics", "log_dict", "end"]
    numbers = mlflow.calls[3][1]
    assert numbers["linear/answer/hypervolume"] == 0.5
    assert numbers["linear/answer/0.1/mip"] == 0.25
    assert mlflow.calls[4][1:] == (METRICS, "metrics.json")


def test_wandb_gets_settings_numbers_and_a_table_of_points():
    logged = {}
    run = SimpleNamespace(log=logged.update, finish=lambda: logged.update(finished=True))
    wandb = SimpleNamespace(
        init=lambda **options: logged.update(options) or run, Table=lambda columns, data: (columns, data)
    )
    log_evaluation(Tracker.WANDB, wandb, METRICS, name="run")
    columns, [row] = logged["points"]
    assert dict(zip(columns, row, strict=True))["objectives.a_b"] == 0.7
    assert logged["config"]["cage_run"] == "abc"
    assert logged["finished"]
    assert named_numbers(METRICS).items() <= logged.items()


@pytest.mark.parametrize("tracker", list(Tracker))
def test_a_tracker_that_fails_says_why_in_a_line(tracker):
    def fail(*args, **kwargs):
        raise RuntimeError("no route\nto host")

    with pytest.raises(ConfigurationError, match=rf"{tracker} did not take the results \(RuntimeError: no route to"):
        log_evaluation(tracker, SimpleNamespace(set_experiment=fail, init=fail), METRICS, name="run")


@pytest.mark.parametrize("name", list(Tracker))
def test_a_tracker_that_is_installed_takes_the_results(name, tmp_path, monkeypatch):
    package = pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    for key, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # the small package has no database
    }.items():
        monkeypatch.setenv(key, value)
    assert open_tracker(name) is package
    log_evaluation(name, package, METRICS, name="run")
    assert any(tmp_path.rglob("*"))


def test_numbers_of_answers_by_hand():
    answers = pa.table(
        {
            "row_id": ["a", "b", "c"],
            "variant": [0, 0, 1],
            "sample": [0, 0, 0],
            "num_tokens": [4, 10, 2],
            "num_reasoning_tokens": [None, 3, 2],
            "kl_per_token": [0.5, None, 1.0],
            "covered_mass": [1.0, 1.0, 1.0],
            "max_residual": [0.0, 0.0, 0.0],
            "num_unsolved": [0, 0, 0],
            "finish_reason": ["stop", "length", "reasoning"],
            "response": ["a b a b", "one two three one two three", ""],
        }
    )
    found = as_numbers(answers)
    assert set(found.column_names) == {"row_id", "variant", "sample", *NUMBERS}
    assert found["answer_tokens"].to_pylist() == [4, 7, 0]
    assert as_numbers(answers.drop_columns("num_reasoning_tokens"))["answer_tokens"].to_pylist() == [4, 10, 2]
    assert found["kl_per_answer"].to_pylist() == [2.0, None, 2.0]
    assert [found[name].to_pylist() for name in ("ended", "cut", "in_reasoning")] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert found["empty"].to_pylist() == [0, 0, 1]
    assert found["distinct_2"].to_pylist() == pytest.approx([2 / 3, 3 / 5, 1.0])
    assert found["repetition_3"].to_pylist() == pytest.approx([0.0, 0.5, 0.0])
