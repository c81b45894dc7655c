"""The progress line: rewritten in place on a terminal, a new line every 30 s elsewhere."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from pipeline.monitoring.counts import Counts

TERMINAL_S = 0.5
LOG_S = 30.0
LOOK_S = 2.0  # from one look for new warnings to the next
FIRST_STEPS = 2  # steps that are sent before the first one is answered


class Notices(Protocol):
    """What there is to say about the answers so far, beside the progress."""

    def __call__(self, counts: Counts, *, is_last: bool) -> Sequence[str]: ...


def no_notices(counts: Counts, *, is_last: bool) -> Sequence[str]:
    """Nothing to say."""
    return ()


class ProgressLine:
    """Prints rows, shards, tokens/s, time left and errors of a run.

    Args:
        out: where it is printed.
        num_rows: answers of the whole run.
        num_shards: shards of the whole run.
        rows_before: answers that were done before the command started.
        shards_before: shards that were done before the command started.
        notices: warnings, each of which is printed on a line of its own.
    """

    def __init__(
        self,
        out: TextIO,
        *,
        num_rows: int,
        num_shards: int,
        rows_before: int = 0,
        shards_before: int = 0,
        notices: Notices = no_notices,
    ) -> None:
        self._out = out
        self._num_rows = num_rows
        self._num_shards = num_shards
        self._rows_before = rows_before
        self.shards_done = shards_before
        self._notices = notices
        self._began_s: float | None = None  # when the first step was seen: loading says nothing about the speed
        self._rows_seen = 0
        self._ends_s: float | None = None
        self._is_terminal = out.isatty()
        self._width = 0

    def shard_done(self, *, num_rows_found: int = 0) -> None:
        """Count a shard.

        Args:
            num_rows_found: the answers of a shard that was found committed: they are done, but not by this command,
                and must not count for its speed.
        """
        self.shards_done += 1
        self._rows_before += num_rows_found

    def text(self, counts: Counts, waits: Sequence[str] = ()) -> str:
        """The line for these counts; before the first tokens it says what is waited for."""
        now_s = time.monotonic()
        rows = min(self._rows_before + counts.rows, self._num_rows)
        done = f"{rows:,}/{self._num_rows:,} rows  {self.shards_done:,}/{self._num_shards:,} shards  "
        if not counts.rows and counts.steps <= FIRST_STEPS and waits:
            return f"{done}waiting for {_plain_wait(waits[0])}"
        if self._began_s is None and (counts.rows or counts.steps):
            self._began_s = now_s
        elapsed_s = max(now_s - (self._began_s or now_s), 1e-9)
        speed = counts.tokens / elapsed_s if elapsed_s > 1e-3 else 0.0
        left = self._left(counts.rows, self._num_rows - rows, elapsed_s, now_s)
        return f"{done}{speed:,.0f} tokens/s  {left} left  {counts.failed:,} failed"

    def _left(self, num_rows: int, rows_left: int, elapsed_s: float, now_s: float) -> str:
        """The time left. It is estimated when rows have ended, and counts down until the next ones have."""
        if num_rows > self._rows_seen:
            self._rows_seen = num_rows
            self._ends_s = now_s + rows_left * elapsed_s / num_rows
        if self._ends_s is None or not rows_left or self._ends_s < now_s:
            return "--"
        return duration(self._ends_s - now_s)

    def show(self, counts: Counts, *, waits: Sequence[str] = (), is_last: bool = False) -> None:
        """Print the line now."""
        line = self.text(counts, waits)
        if self._is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be rewritten
            self._out.write("\r" + line.ljust(self._width) + ("\n" if is_last else ""))
            self._width = len(line)
        else:
            self._out.write(line + "\n")
        self._out.flush()

    def notify(self, counts: Counts, *, is_last: bool = False) -> None:
        """Print the notices that are new."""
        for notice in self._notices(counts, is_last=is_last):
            if self._is_terminal and self._width:
                self._out.write("\r" + " " * self._width + "\r")
                self._width = 0
            self._out.write(notice + "\n")
            self._out.flush()

    @contextmanager
    def running(
        self, read_counts: Callable[[], Counts], read_waits: Callable[[], Sequence[str]] = lambda: ()
    ) -> Iterator[None]:
        """Keep printing the line from a thread of its own until the block ends, and once more then.

        Args:
            read_counts: what was done so far.
            read_waits: what is waited for, longest first.
        """
        ended = threading.Event()
        every_s = TERMINAL_S if self._is_terminal else LOG_S

        def keep_showing() -> None:
            shown_s = time.monotonic()
            while not ended.wait(min(every_s, LOOK_S)):
                counts = read_counts()
                self.notify(counts)
                if (now_s := time.monotonic()) - shown_s >= every_s:
                    shown_s = now_s
                    is_waiting = not counts.rows and counts.steps <= FIRST_STEPS
                    self.show(counts, waits=read_waits() if is_waiting else ())

        thread = threading.Thread(target=keep_showing, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            counts = read_counts()
            self.show(counts, is_last=True)
            self.notify(counts, is_last=True)


def _plain_wait(wait: str) -> str:
    """A wait as the progress line shows it: a host's first answer is its first pass."""
    return re.sub(r"an answer of host (\S+) to (advance|values_at|score)\w*", r"the first pass of \1", wait)


def duration(seconds: float) -> str:
    """A time span for people: 42 s, 3 min 05 s, 2 h 07 min, 3 d 04 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
