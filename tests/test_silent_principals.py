"""A principal that values no token is reported: while the run goes on, in its status and in its report."""

from __future__ import annotations

import io

import pytest
import torch
from support.decoding import NOWHERE
from support.heads import with_head
from support.preference_adapters import make_preference_adapter
from support.runs import PRINCIPALS, job, run_job, write_prompts
from support.tiny_models import make_model, make_reward_model

from jobs.commands.plan import describe_plan
from jobs.commands.status import describe_status
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.events import Notice
from pipeline.monitoring.progress import ProgressLine
from pipeline.monitoring.values import SilenceWatch, ValueRange, add_values, describe_silent
from pipeline.principals.kinds import KINDS
from pipeline.reporting.page import render_report
from pipeline.runtime.replica_plan import plan_replica
from pipeline.runtime.wiring import DIRECT
from pipeline.stages.relabel import prepare, relabel

DROPS_PRINCIPLE = "{{ principle[:0] }}{% for message in messages if message['role'] == 'user' %}x{% endfor %}"


@pytest.fixture
def silent_by_kind(tmp_path):
    """A principal of each kind that values no token, and why."""
    model = str(make_model(tmp_path / "model", seed=5))
    make_reward_model(tmp_path / "flat")
    _flatten(tmp_path / "flat")
    valueless = with_head(
        tmp_path / "model", tmp_path / "valued", {"v_head.summary.weight": torch.zeros(1, 64)}, drop=()
    )
    untrained = make_preference_adapter(tmp_path / "parm", tmp_path / "model", size=0.0)
    return {
        "prompted": {"kind": "prompted", "principle": "be kind", "template": DROPS_PRINCIPLE, "model": model},
        "tuned_pair": {"kind": "tuned_pair", "model": model, "reference": model},
        "arm": {"kind": "arm", "model": model, "reference": model},
        "formula": {
            "kind": "formula",
            "formula": "one - other",
            "terms": {"one": {"model": model}, "other": {"model": model}},
        },
        "value": {"kind": "value", "model": str(valueless), "candidates": 3},
        "preference_arm": {"kind": "preference_arm", "model": model, "adapter": str(untrained), "objective": "0"},
        "judge": {"kind": "judge", "judge": {"kind": "repetition", "n": 16}},
        "reward_model": {"kind": "reward_model", "model": str(tmp_path / "flat"), "candidates": 3},
    }


def _flatten(folder):
    """Make a sequence classifier that gives every text the score 0."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data.zero_()
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_silent_principal_of_any_kind_is_reported_with_likely_reasons(tiny, tmp_path, silent_by_kind, kind):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 9)
    principals = {"mute": silent_by_kind[kind], "brief": PRINCIPALS["brief"]}
    decoding = {"unit": "answer", "proposals": 3} if kind == "judge" else {}
    config = job(prompts, tmp_path / "run", tiny(), principals=principals, decoding=decoding)
    out = io.StringIO()
    run, _ = relabel(config, tmp_path / "cache", out, wiring=DIRECT)
    lines = [line for line in out.getvalue().splitlines() if "has not valued any token" in line]
    assert len(lines) == 1
    assert lines[0].startswith("principal mute has not valued any token: its q is 0 at all ")
    assert KINDS[kind].silent_because in lines[0]
    assert list(run.status().silent) == ["mute"]
    assert f"warning   {run.status().silent['mute']}" in describe_status(run)
    assert "principal mute has not valued any token" in render_report(run).decode()


def test_an_adapter_of_another_model_is_a_warning_of_plan_and_run(tmp_path):
    """Models of one shape take each other's adapters, and then values are those of no reward model."""
    one, copy, other = (make_model(tmp_path / name, seed=5) for name in ("one", "copies/one", "other"))
    principals = {"it": {"kind": "preference_arm", "adapter": str(make_preference_adapter(tmp_path / "parm", one))}}
    principals["it"] |= {"objective": 0}
    said = []
    for base in (one, copy, other):
        config = job(
            write_prompts(tmp_path / "in.jsonl", 3), tmp_path / f"on-{base.name}", base, principals=principals
        )
        prepared = prepare(config, tmp_path / "cache")
        said.append("was trained on" in describe_plan(prepared.plan, plan_replica(config, prepared.models, NOWHERE)))
    assert said == [False, False, True]
    out = io.StringIO()
    relabel(config, tmp_path / "cache", out, wiring=DIRECT)
    line = f"warning   adapter {tmp_path / 'parm'} says that it was trained on {one}, and is used on {other}"
    assert line in out.getvalue()


def test_principals_that_steer_are_not_reported(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 9)
    run, _ = run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    values = {name: found for record in run.committed().values() for name, found in record.value_ranges.items()}
    assert set(values) == set(PRINCIPALS)
    assert all(found.high > found.low for found in values.values())
    assert run.status().silent == {}
    assert "warning" not in describe_status(run)


def test_a_constant_is_as_silent_as_zero_and_a_small_value_is_not():
    ranges = {
        "zero": ValueRange(4, 40, 0.0, 0.0),
        "constant": ValueRange(4, 40, -2.5, -2.5),
        "small": ValueRange(4, 40, -0.001, 0.001),
        "once": ValueRange(4, 40, 0.0, 0.01),
        "short": ValueRange(40, 40, 1.5, 1.5),  # answers of one token to one prompt
        "few": ValueRange(1, 3, 0.0, 0.0),
        "nothing": ValueRange(),
    }
    found = describe_silent(ranges, {})
    assert list(found) == ["zero", "constant"]
    assert "its q is -2.5 at all 40 tokens of 4 answers" in found["constant"]


def test_a_value_that_comes_late_is_a_value():
    first, later = {"kind": ValueRange(8, 80, 0.0, 0.0)}, {"kind": ValueRange(1, 10, -0.5, 0.0)}
    assert describe_silent(first, {})
    assert not describe_silent(add_values(first, later), {})


def test_it_is_said_once_and_at_the_latest_with_the_last_answer():
    watch = SilenceWatch({"kind": {"kind": "prompted"}})
    few, enough = {"kind": ValueRange(7, 70, 0.0, 0.0)}, {"kind": ValueRange(8, 80, 0.0, 0.0)}
    assert watch.lines(few) == []
    assert len(watch.lines(enough)) == 1
    assert watch.lines(enough, is_last=True) == []
    assert len(SilenceWatch({}).lines(few, is_last=True)) == 1


def test_the_terminal_shows_it_on_a_line_of_its_own():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    watch, out = SilenceWatch({}), Terminal()

    def notices(counts, *, is_last):
        return [Notice(text) for text in watch.lines(counts.values, is_last=is_last)]

    line = ProgressLine(out, num_rows=9, num_shards=1, notices=notices)
    counts = Counts(rows=8, values={"kind": ValueRange(8, 80, 0.0, 0.0)})
    line.show(counts)
    line.notify(counts)
    line.show(counts)
    rewritten = out.getvalue().split("\n")
    assert len(rewritten) == 2
    assert rewritten[0].split("\r")[-1].startswith("principal kind has not valued any token")
