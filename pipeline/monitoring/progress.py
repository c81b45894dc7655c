"""The progress line: rewritten in place on a terminal, a new line every 30 s elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from pipeline.monitoring.counts import Counts

TERMINAL_S = 0.5
LOG_S = 30.0


class ProgressLine:
    """Prints rows, shards, tokens/s, time left and errors of a run.

    Args:
        out: where it is printed.
        num_rows: answers of the whole run.
        num_shards: shards of the whole run.
        rows_before: answers that were done before the command started.
        shards_before: shards that were done before the command started.
    """

    def __init__(
        self, out: TextIO, *, num_rows: int, num_shards: int, rows_before: int = 0, shards_before: int = 0
    ) -> None:
        self._out = out
        self._num_rows = num_rows
        self._num_shards = num_shards
        self._rows_before = rows_before
        self.shards_done = shards_before
        self._started_s = time.monotonic()
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

    def text(self, counts: Counts) -> str:
        """The line for these counts."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        rows = min(self._rows_before + counts.rows, self._num_rows)
        left = "--"
        if counts.rows and rows < self._num_rows:
            left = duration((self._num_rows - rows) * elapsed_s / counts.rows)
        return (
            f"{rows:,}/{self._num_rows:,} rows  {self.shards_done:,}/{self._num_shards:,} shards  "
            f"{counts.tokens / elapsed_s:,.0f} tokens/s  {left} left  {counts.rejected:,} errors"
        )

    def show(self, counts: Counts, *, is_last: bool = False) -> None:
        """Print the line now."""
        line = self.text(counts)
        if self._is_terminal:
            self._out.write("\r" + line.ljust(self._width) + ("\n" if is_last else ""))
            self._width = len(line)
        else:
            self._out.write(line + "\n")
        self._out.flush()

    @contextmanager
    def running(self, read_counts: Callable[[], Counts]) -> Iterator[None]:
        """Keep printing the line from a thread of its own until the block ends, and once more then."""
        ended = threading.Event()
        every_s = TERMINAL_S if self._is_terminal else LOG_S

        def keep_showing() -> None:
            while not ended.wait(every_s):
                self.show(read_counts())

        thread = threading.Thread(target=keep_showing, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.show(read_counts(), is_last=True)


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
