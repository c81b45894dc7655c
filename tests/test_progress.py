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
    text = line.text(Counts(rows=250, rejected=3, tokens=10_000))
    assert text.startswith("750/1,000 rows  3/4 shards  ")
    assert " tokens/s  " in text
    assert text.endswith("left  3 errors")
    assert "--" in line.text(Counts())


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
