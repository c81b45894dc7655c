"""What a run reports while it goes on."""

from __future__ import annotations

import io
import time

import pytest

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
    assert text.endswith("left  3 failed")
    assert "--" in ProgressLine(io.StringIO(), num_rows=9, num_shards=1).text(Counts(steps=9))


def test_the_time_left_counts_down_until_more_rows_have_ended(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    line = ProgressLine(io.StringIO(), num_rows=100, num_shards=1)

    def left(at_s, rows):
        now_s[0] = at_s
        return line.text(Counts(rows=rows, steps=at_s + 9)).split("  ")[3]

    assert left(100, 0) == "-- left"  # models were loaded for 100 s, which says nothing of the speed
    assert left(110, 10) == "1 min 30 s left"
    assert [left(at_s, 10) for at_s in (120, 130, 199)] == ["1 min 20 s left", "1 min 10 s left", "1 s left"]
    assert left(210, 10) == "-- left"
    assert left(220, 60) == "1 min 20 s left"


def test_before_the_first_tokens_it_says_what_is_waited_for():
    line = ProgressLine(io.StringIO(), num_rows=9, num_shards=2)
    assert (
        line.text(Counts(), ["host base to load (3 s)"])
        == "0/9 rows  0/2 shards  waiting for host base to load (3 s)"
    )
    first = line.text(Counts(steps=1), ["an answer of host base to advance_and_sample (2 s)"])
    assert first.endswith("waiting for the first pass of base (2 s)")
    assert "waiting" not in line.text(Counts(steps=3), ["an answer of host base to advance_and_sample (2 s)"])


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
    import threading

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
