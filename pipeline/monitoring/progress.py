"""The progress line: rewritten in place on a terminal, a new line every 30 s elsewhere."""

from __future__ import annotations

import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from pipeline.monitoring.counts import Counts
from pipeline.monitoring.events import EventLog, Notice, events_of

TERMINAL_S = 0.5
LOG_S = 30.0
LOOK_S = 2.0  # from one look for new warnings to the next
IDLE = "a shard"  # what a replica without work waits for
FIRST_STEPS = 2  # steps that are sent before the first one is answered
SETTLED_S = 1.0  # after so long, and so many of the rows, there is a speed and an estimate
SETTLED_SHARE = 0.05
RAISED, RAISED_S = 2.0, 60.0  # the time left is raised only where it is off by this factor and so many seconds


class Notices(Protocol):
    """What there is to say about the answers so far, beside the progress."""

    def __call__(self, counts: Counts, *, is_last: bool) -> Sequence[Notice]: ...


def no_notices(counts: Counts, *, is_last: bool) -> Sequence[Notice]:
    """Nothing to say."""
    return ()


class ProgressLine:
    """Prints rows, shards, tokens/s, time left and errors of a run.

    Args:
        out: where it is printed; a log of events gets events `progress`, `shard` and those of notices.
        num_rows: answers of the whole run.
        num_shards: shards of the whole run.
        rows_before: answers that were done before the command started.
        shards_before: shards that were done before the command started.
        tokens_before: of those answers; what is left is reckoned with the tokens of all that is done.
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
        tokens_before: int = 0,
        notices: Notices = no_notices,
    ) -> None:
        self._out = out
        self._events = events_of(out)
        self._num_rows = num_rows
        self._num_shards = num_shards
        self._rows_before = rows_before
        self._counted_before = (rows_before, tokens_before)
        self.shards_done = shards_before
        self._notices = notices
        self._began_s: float | None = None  # when the first step was seen: loading says nothing about the speed
        self._rows_seen = 0
        self._ends_s: float | None = None
        self._shards_before = shards_before
        self._stage, self._stage_s = "", 0.0  # what was waited for last, and since when
        self._is_terminal = out.isatty()
        self._width = 0

    def shard_done(
        self, *, num_rows_found: int = 0, shard: int | None = None, rows: int | None = None, failed: int | None = None
    ) -> None:
        """Count a shard.

        Args:
            shard: its number, for the event.
            rows: its aligned answers, for the event.
            failed: its failed answers, for the event.
            num_rows_found: the answers of a shard that was found committed: they are done, but not by this command,
                and must not count for its speed.
        """
        self.shards_done += 1
        self._rows_before += num_rows_found
        if self._events is not None and shard is not None:
            self._events.event("shard", shard=shard, rows=rows, failed=failed, was_found=bool(num_rows_found))

    def text(self, counts: Counts, waits: Sequence[str] = ()) -> str:
        """The line for these counts; before the first tokens it says what is waited for."""
        self._note(counts)
        rows = min(self._rows_before + counts.rows, self._num_rows)
        done = f"{rows:,}/{self._num_rows:,} rows  {self.shards_done:,}/{self._num_shards:,} shards  "
        if _is_starting(counts):
            self._enter(_stage_of(waits))
            return f"{done}{self._stage} ({duration(time.monotonic() - self._stage_s)})"
        failed = f"{counts.failed:,} failed"
        if not counts.rows:
            return f"{done}step {counts.steps:,} of the first rows  {failed}"
        pace = self._pace(counts)
        speed = "--" if pace is None else f"{pace:,.0f}"
        left = f"  {left} left" if (left := self._left(self._num_rows - rows)) else ""
        return f"{done}{speed} tokens/s{left}  {failed}"

    def _pace(self, counts: Counts) -> float | None:
        """Tokens per second; None within the first moment, when there is none yet."""
        elapsed_s = 0.0 if self._began_s is None else time.monotonic() - self._began_s
        return counts.tokens / elapsed_s if elapsed_s >= SETTLED_S else None

    def _show_event(self, events: EventLog, counts: Counts, waits: Sequence[str], *, is_last: bool) -> None:
        self._note(counts)
        pace = self._pace(counts)
        left_s = None if self._ends_s is None else max(0, round(self._ends_s - time.monotonic()))
        events.event(
            "progress",
            rows=min(self._rows_before + counts.rows, self._num_rows),
            num_rows=self._num_rows,
            shards=self.shards_done,
            num_shards=self._num_shards,
            failed=counts.failed,
            tokens=counts.tokens,
            tokens_per_second=None if pace is None else round(pace, 1),
            seconds_left=left_s,
            waiting_for=_stage_of(waits) if _is_starting(counts) else None,
            is_last=is_last,
        )

    def _note(self, counts: Counts) -> None:
        """Remember when the first step was seen, and estimate the end when more rows have ended."""
        now_s = time.monotonic()
        if self._began_s is None and not _is_starting(counts):
            self._began_s = now_s
        if self._began_s is None or counts.rows <= self._rows_seen:
            return
        self._rows_seen = counts.rows
        num_left = self._num_rows - self._rows_before - counts.rows
        elapsed_s = now_s - self._began_s
        # the first rows that end are the short ones: they say little about the others
        if elapsed_s < SETTLED_S or counts.rows < SETTLED_SHARE * (counts.rows + num_left):
            return
        left_s = self._tokens_left(num_left, counts) * elapsed_s / max(counts.tokens, 1)
        if not counts.tokens:
            left_s = num_left * elapsed_s / counts.rows
        shown_s = math.inf if self._ends_s is None else max(0.0, self._ends_s - now_s)
        if left_s > RAISED * shown_s + RAISED_S:  # far off: a wrong time would be shown for long
            shown_s = left_s
        self._ends_s = now_s + min(left_s, shown_s)

    def _tokens_left(self, rows_left: int, counts: Counts) -> float:
        """The tokens of the rows that are left, as many for each as of those done, by this command or before it."""
        rows_before, tokens_before = self._counted_before
        return rows_left * (tokens_before + counts.tokens) / (rows_before + counts.rows)

    def _left(self, rows_left: int) -> str:
        """The time left. It counts down and is not raised, unless it is far off."""
        if self._ends_s is None or not rows_left:
            return ""
        left_s = self._ends_s - time.monotonic()
        return duration(left_s) if left_s >= 1 else "some seconds"

    def show(self, counts: Counts, *, waits: Sequence[str] = (), is_last: bool = False) -> None:
        """Print the line now."""
        if self._events is not None:
            self._show_event(self._events, counts, waits, is_last=is_last)
            return
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
            if self._events is not None:
                self._events.notice(notice)
                continue
            self._clear()
            self._out.write(notice.text + "\n")
            self._out.flush()

    def _clear(self) -> None:
        """Remove the line from a terminal."""
        if self._is_terminal and self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()
            self._width = 0

    def _enter(self, stage: str) -> bool:
        """Remember what is waited for and since when; returns whether it is something new."""
        if is_new := stage != self._stage:
            self._stage, self._stage_s = stage, time.monotonic()
        return is_new

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
                self._note(counts)
                self.notify(counts)
                waits = read_waits() if _is_starting(counts) else ()
                is_new = _is_starting(counts) and self._enter(_stage_of(waits))
                if (now_s := time.monotonic()) - shown_s >= every_s or is_new:
                    shown_s = now_s
                    self.show(counts, waits=waits)

        thread = threading.Thread(target=keep_showing, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            counts = read_counts()
            if not _is_starting(counts) or self.shards_done > self._shards_before:
                self.show(counts, is_last=True)
            else:  # it ended before anything was done: what was waited for says nothing now
                self._clear()
            self.notify(counts, is_last=True)


def _is_starting(counts: Counts) -> bool:
    """Whether no token has been drawn: the first steps are sent before the first one is answered."""
    return not counts.rows and counts.steps <= FIRST_STEPS


def _stage_of(waits: Sequence[str]) -> str:
    """What is waited for, without the seconds: a model that loads, or else the longest wait.

    A host's first answer is its first pass.
    """
    waits = [wait for wait in waits if not wait.endswith(IDLE)]
    if not waits:
        return "starting"
    wait = next((each for each in waits if "loading " in each), waits[0])
    without_seconds = re.sub(r" \(\d+ s\)$", "", wait)
    return re.sub(r"an answer of host (\S+) to \w+", r"first pass of \1", without_seconds)


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
