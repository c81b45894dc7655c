"""Measures a host in its own process: what it computed, and how long it had nothing to do."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.monitoring.metrics import HostReport
from pipeline.protocol.messages import HostWork

REFRESH_S = 5.0  # between two looks at what the host did: on a GPU each waits for the pass that runs


class HostMeter:
    """Counts the seconds between the calls of a host, and reads its work from time to time.

    Args:
        read_work: returns the host's work. It is called in the threads that call the host, between its calls.
        clock: monotonic seconds.
    """

    def __init__(self, read_work: Callable[[], HostWork], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._read_work = read_work
        self._clock = clock
        self._lock = threading.Lock()
        self._work = HostWork()
        self._num_calls = 0
        self._idle_s = 0.0
        self._idle_since_s = clock()
        self._read_s = -math.inf

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A call of the host, for as long as the block runs."""
        with self._lock:
            if not self._num_calls:
                self._idle_s += self._clock() - self._idle_since_s
            self._num_calls += 1
        try:
            yield
            if self._clock() - self._read_s >= REFRESH_S:
                self._work, self._read_s = self._read_work(), self._clock()
        finally:
            with self._lock:
                self._num_calls -= 1
                self._idle_since_s = self._clock()

    def read(self) -> HostReport:
        """What was measured up to now. Call it in the thread that calls the host, between its calls."""
        self._work, self._read_s = self._read_work(), self._clock()
        return self.report()

    def report(self) -> HostReport:
        """What was measured so far. May be called from any thread."""
        with self._lock:
            running = 0.0 if self._num_calls else self._clock() - self._idle_since_s
            return HostReport(self._work, self._idle_s + running)
