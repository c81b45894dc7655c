"""End a run that makes no progress for a given time, or in which an error was found."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.errors import CageError, RunStalled

SHOWN_WAITS = 4


class _Alarm(BaseException):
    """Raised in the main thread, wherever it is; no Exception, so that code that handles errors does not catch it."""


@contextmanager
def ended_when_stalled(
    limit_s: float,
    read_progress: Callable[[], Hashable],
    read_waits: Callable[[], Sequence[str]],
    *,
    find_error: Callable[[], CageError | None] = lambda: None,
) -> Iterator[None]:
    """Raise RunStalled out of the block once `read_progress` gives the same answer for `limit_s`.

    An error that `find_error` returns is raised out of the block, too.

    The main thread is interrupted by SIGALRM, as it is by a user's SIGINT. In another thread the block runs without
    this check, since nothing can interrupt it.

    Args:
        limit_s: how long nothing may change.
        read_progress: returns something that changes with every progress.
        read_waits: returns what the run waits for, for the message.
        find_error: called every few seconds; returns the error that ends the run, or None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    check = _StallCheck(limit_s, read_progress, read_waits, find_error)
    before = signal.signal(signal.SIGALRM, check.interrupt)
    thread = threading.Thread(target=check.run, name="stall", daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            check.ended.set()
    except _Alarm:
        assert check.error is not None
        raise check.error from None
    finally:
        check.ended.set()
        thread.join()
        signal.signal(signal.SIGALRM, before)


class _StallCheck:
    """Checks for progress in a thread of its own; `error` is set once one is found, or none was made."""

    def __init__(
        self,
        limit_s: float,
        read_progress: Callable[[], Hashable],
        read_waits: Callable[[], Sequence[str]],
        find_error: Callable[[], CageError | None],
    ) -> None:
        self._limit_s = limit_s
        self._read_progress = read_progress
        self._read_waits = read_waits
        self._find_error = find_error
        self.ended = threading.Event()
        self.error: CageError | None = None

    def run(self) -> None:
        every_s = min(self._limit_s / 4, 5.0)
        progress, changed_s = self._read_progress(), time.monotonic()
        while not self.ended.wait(every_s):
            found = self._read_progress()
            if found != progress:
                progress, changed_s = found, time.monotonic()
            elif time.monotonic() - changed_s >= self._limit_s:
                self.error = RunStalled(self._describe())
            self.error = self.error or self._find_error()
            # repeatedly: Python drops an exception that is raised inside a destructor
            while self.error is not None and not self.ended.wait(every_s):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    def interrupt(self, *_: object) -> None:
        if self.error is not None and not self.ended.is_set():
            raise _Alarm

    def _describe(self) -> str:
        waits = list(self._read_waits())
        shown = "; ".join(waits[:SHOWN_WAITS]) or "nothing that it knows of"
        more = f"; and {len(waits) - SHOWN_WAITS} more" if len(waits) > SHOWN_WAITS else ""
        return (
            f"no row was finished and no token drawn for {self._limit_s:g} s (cluster.stall_timeout_s); "
            f"waiting for: {shown}{more}. What is committed is kept, and the same command continues"
        )
