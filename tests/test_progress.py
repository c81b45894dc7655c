"""What a run reports while it goes on."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest

from pipeline.monitoring import progress
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.progress import ProgressLine, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_has_rows_shards_speed_time_left_and_errors():
    line = ProgressLine(io.StringIO(), num_rows=1000, num_shards=4, rows_before=500, shards_before=2)
    line.shard_done()
    text = line.text(Counts(rows=250, failed=3, tokens=10_000))
    assert text.startswith("750/1,000 rows  3/4 shards  ")
    assert " tokens/s  " in text
    assert text.endswith("  3 failed")
    first = ProgressLine(io.StringIO(), num_rows=9, num_shards=1).text(Counts(steps=9))
    assert first == "0/9 rows  0/1 shards  step 9 of the first rows  0 failed"


@pytest.fixture
def clock(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


def test_the_time_left_counts_down_and_is_not_raised(clock):
    line = ProgressLine(io.StringIO(), num_rows=100, num_shards=1)

    def left(at_s, rows):
        clock[0] = at_s
        found = re.search(r"  ([^/]*) left", line.text(Counts(rows=rows, steps=at_s + 9)))
        return found and found[1]

    assert left(100, 0) is None  # models were loaded for 100 s, which says nothing of the speed
    assert left(104, 4) is None  # the first rows that end are the short ones
    assert left(110, 10) == "1 min 30 s"
    assert [left(at_s, 10) for at_s in (120, 130)] == ["1 min 20 s", "1 min 10 s"]
    assert left(131, 20) == "1 min 09 s"  # by the speed so far 2 min 04 s
    assert left(140, 60) == "26 s"
    assert left(200, 61) == "1 min 03 s"  # no row for a minute: that is far off
    assert left(500, 99) == "some seconds"
    assert left(500, 100) is None


def test_the_time_left_is_by_tokens_of_what_is_done(clock):
    """Ten answers of 100 tokens in 10 s, after ninety of 20: 100 are left with the mean of all, 28 tokens."""
    line = ProgressLine(
        io.StringIO(), num_rows=200, num_shards=2, rows_before=90, shards_before=1, tokens_before=1800
    )
    clock[0] = 0.0
    line.text(Counts(steps=9))
    clock[0] = 10.0
    assert "  28 s left" in line.text(Counts(rows=10, tokens=1000, steps=99))


def test_the_time_left_never_rises_in_a_run_of_even_speed(clock):
    # rows that began together end by length: the first ones say that all are fast, the later ones that all are slow
    line = ProgressLine(io.StringIO(), num_rows=60, num_shards=1)
    line.text(Counts(steps=9))
    ends_s = sorted(60 * (1 + at % 20) / 20 + 60 * (at // 20) for at in range(60))
    shown = []
    for step in range(1, 1900):
        clock[0] = step / 10
        text = line.text(Counts(rows=sum(end_s <= clock[0] for end_s in ends_s), steps=step + 9))
        if found := re.search(r"  (?:(\d+) min )?(\d+) s left", text):
            shown.append(60 * int(found[1] or 0) + int(found[2]))
    assert shown == sorted(shown, reverse=True)
    assert len(shown) > 1000


def test_speed_and_time_are_taken_while_nothing_is_shown(clock):
    out = io.StringIO()
    line = ProgressLine(out, num_rows=10, num_shards=1)
    line._note(Counts(steps=5))
    clock[0] = 20.0
    assert line.text(Counts(rows=5, tokens=100)) == "5/10 rows  0/1 shards  5 tokens/s  20 s left  0 failed"


def test_before_the_first_tokens_it_says_what_is_waited_for_and_since_when(clock):
    line = ProgressLine(io.StringIO(), num_rows=9, num_shards=2)
    base = "0/9 rows  0/2 shards  "
    assert line.text(Counts(), ["starting Ray (7 s)"]) == f"{base}starting Ray (0 s)"
    clock[0] = 3.0
    assert line.text(Counts(), ["starting Ray (1 s)"]) == f"{base}starting Ray (3 s)"
    loading = ["replica a: the commit of shard 1 (9 s)", "replica a: loading base (538 MB) (3 s)"]
    assert line.text(Counts(), loading) == f"{base}replica a: loading base (538 MB) (0 s)"
    first = line.text(Counts(steps=1), ["an answer of host base to advance_and_sample (2 s)"])
    assert first == f"{base}first pass of base (0 s)"
    assert "first pass" not in line.text(Counts(steps=3), ["an answer of host base to advance_and_sample (2 s)"])


def test_a_file_gets_a_line_for_everything_new_that_is_waited_for(monkeypatch):
    monkeypatch.setattr(progress, "LOOK_S", 0.01)
    out = io.StringIO()
    stages = iter(["starting Ray", "starting Ray", "loading base (5 MB)", "loading base (5 MB)"])
    ended = threading.Event()

    def waits():
        if (stage := next(stages, None)) is None:
            ended.set()
            return ["loading base (5 MB)"]
        return [stage]

    line = ProgressLine(out, num_rows=9, num_shards=2)
    with line.running(Counts, waits):
        assert ended.wait(10)
    assert [each.split("  ")[2] for each in out.getvalue().splitlines()] == [
        "starting Ray (0 s)",
        "loading base (5 MB) (0 s)",
    ]  # and nothing of a run that ended before its first token


def test_the_line_of_a_terminal_goes_where_a_run_ends_before_it_began(monkeypatch):
    out = Terminal()
    line = ProgressLine(out, num_rows=9, num_shards=2)
    with line.running(Counts):
        line.show(Counts(), waits=["starting Ray (1 s)"])
    assert out.getvalue().split("\r")[-2].strip() == ""
    assert out.getvalue().endswith("\r")


def test_a_line_is_cut_to_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    ProgressLine(out, num_rows=9, num_shards=2).show(Counts(), waits=["host base to load " * 9])
    assert len(out.getvalue().strip("\r")) == 39


def test_a_terminal_gets_one_line_that_is_rewritten_and_a_file_whole_lines():
    for out, separator in ((Terminal(), "\r"), (io.StringIO(), "\n")):
        line = ProgressLine(out, num_rows=10, num_shards=1)
        line.show(Counts(rows=1))
        line.show(Counts(rows=10), is_last=True)
        assert out.getvalue().count(separator) == 2
        assert out.getvalue().endswith("\n")


def test_the_last_counts_are_shown_when_the_run_ends_in_an_error():
    out = io.StringIO()
    line = ProgressLine(out, num_rows=10, num_shards=1)
    with pytest.raises(KeyError), line.running(lambda: Counts(rows=7)):
        raise KeyError
    assert out.getvalue().startswith("7/10 rows")


def test_the_thread_ends_with_the_run():
    line = ProgressLine(Terminal(), num_rows=10, num_shards=1)
    with line.running(Counts):
        time.sleep(0.01)
        assert any(thread.name == "progress" for thread in threading.enumerate())
    assert not any(thread.name == "progress" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (273_600, "3 d 04 h")],
)
def test_time_spans_are_written_for_people(seconds, text):
    assert duration(seconds) == text
