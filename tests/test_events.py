"""Logs as events: one JSON object a line, nothing of prompts and answers, for every command that logs."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import typer
import yaml
from support.runs import job, write_prompts

from jobs import cli
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.events import EventLog, Level, Notice, reason_without_values, without_values
from pipeline.monitoring.progress import ProgressLine
from pipeline.quoting import quote

SECRET = "xylophone"  # stands in prompts and must be in no event


def events_in(text):
    """The events of a log, every line of which must be one."""
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        assert list(event)[:3] == ["time", "level", "event"]
        assert event["level"] in set(Level)
    return events


def test_every_command_that_logs_takes_the_format():
    commands = typer.main.get_command(cli.app).commands
    logging = {name for name, command in commands.items() if any(each.name == "verbose" for each in command.params)}
    assert logging == {"relabel", "evaluate", "synthesize", "train", "retry"}
    for name in logging:
        assert any("--log-format" in each.opts for each in commands[name].params), name


def test_printed_lines_become_messages_and_warnings():
    out = io.StringIO()
    log = EventLog(out)
    print("fetching a model", file=log)
    print("warning: slow\n", file=log, end="")
    log.write("half ")
    log.write("a line\n\n")
    found = [(event["level"], event["text"]) for event in events_in(out.getvalue())]
    assert found == [("info", "fetching a model"), ("warning", "slow"), ("info", "half a line")]


def test_values_are_left_out_of_messages_unless_they_are_asked_for():
    text = (
        f"the row's prompt is '{SECRET}' and \"{SECRET} 'too'\"; it isn't a list\n  3 x {SECRET} (rows a, b)\nmend it"
    )
    assert without_values(text) == "the row's prompt is … and …; it isn't a list\nmend it"
    for keeps in (False, True):
        out = io.StringIO()
        EventLog(out, keeps_values=keeps).message(text)
        assert (SECRET in out.getvalue()) == keeps
    reason = f"line 3 of a.jsonl: the template refuses the prompt: {SECRET} 7"
    assert reason_without_values(reason) == "the template refuses the prompt"


def test_values_that_are_cut_or_have_both_quotation_marks_are_left_out():
    for value in (f"{SECRET} " * 20, f'he said "hi" and it\'s {SECRET}', f"it's {SECRET} " * 20):
        reason = f"the column has {quote(value)}; a number is needed"
        assert SECRET in reason
        assert SECRET not in without_values(reason)
        assert SECRET not in reason_without_values(reason)
        assert without_values(reason).startswith("the column has …")


def test_notices_of_rows_have_fields_and_no_text_unless_values_are_kept():
    notice = Notice(f"row a failed: {SECRET}", "row_failed", {"row_id": "a", "reason": "it is no text"})
    for keeps in (False, True):
        out = io.StringIO()
        EventLog(out, keeps_values=keeps).notice(notice)
        [event] = events_in(out.getvalue())
        assert (event["event"], event["row_id"], event["reason"]) == ("row_failed", "a", "it is no text")
        assert ("text" in event) == keeps


def test_progress_is_numbers():
    out = io.StringIO()
    line = ProgressLine(EventLog(out), num_rows=10, num_shards=3, rows_before=2)
    line.show(Counts(), waits=["loading base (5 MB) (3 s)"])
    line.shard_done(shard=1, rows=3, failed=0)
    line.show(Counts(rows=3, failed=1, tokens=40, steps=9), is_last=True)
    loading, shard, progress = events_in(out.getvalue())
    assert loading["waiting_for"] == "loading base (5 MB)"
    assert (shard["event"], shard["shard"], shard["rows"], shard["was_found"]) == ("shard", 1, 3, False)
    assert (progress["rows"], progress["num_rows"], progress["shards"], progress["failed"]) == (5, 10, 1, 1)
    assert progress["is_last"]
    assert "waiting_for" not in progress


@pytest.fixture(scope="module")
def configured(tiny, tmp_path_factory):
    """A configuration of a small job, one row of which fails with a reason that quotes it."""
    folder = tmp_path_factory.mktemp("events")
    prompts = write_prompts(folder / "prompts.jsonl", 4)
    with prompts.open("a") as file:
        file.write(json.dumps({"id": "bad", "prompt": [{"role": SECRET, "content": SECRET}]}) + "\n")
        file.write(json.dumps({"id": "good", "prompt": f"tell me of {SECRET}"}) + "\n")
    config = job(prompts, folder / "run", tiny(), errors={"budget": 1}, decoding={"trace": "summary"})
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return file


def run_command(*words):
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, words)], capture_output=True, text=True, check=False, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_is_logged_from_its_start_to_its_result_and_its_errors(configured):
    code, out, log = run_command("relabel", "-c", configured, "--log-format", "json")
    assert (code, out) == (0, "")
    events = events_in(log)
    kinds = [event["event"] for event in events]
    assert {"progress", "shard", "row_failed", "result"} <= set(kinds)
    assert kinds[-1] == "result"
    assert (events[-1]["aligned"], events[-1]["failed"], events[-1]["is_complete"]) == (5, 1, True)
    assert next(event["row_id"] for event in events if event["event"] == "row_failed") == "bad"
    assert SECRET not in log
    code, _, log = run_command("relabel", "-c", configured, "--log-format", "json", "decoding.seed=1")
    assert code == 2
    [event] = [event for event in events_in(log) if event["event"] == "error"]
    assert (event["kind"], event["exit_code"], event["level"]) == ("RunMismatch", 2, "error")


def test_a_failed_run_over_its_budget_says_nothing_of_its_rows(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(at), "prompt": [SECRET]}) + "\n" for at in range(12)))
    log = io.StringIO()
    from pipeline.errors import ErrorBudgetExceeded
    from pipeline.stages.relabel import relabel

    config = job(prompts, tmp_path / "run", tiny(), input={"prompt": "prompt"})
    with pytest.raises(ErrorBudgetExceeded) as ended:
        relabel(config, tmp_path / "cache", EventLog(log))
    events_in(log.getvalue())
    assert SECRET not in log.getvalue()
    assert SECRET not in without_values(str(ended.value))
