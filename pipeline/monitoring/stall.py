"""A run that makes no progress for a stated time ends, and says what it was waiting for."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.errors import RunStalled

SHOWN_WAITS = 4


class _Alarm(BaseException):
    """Raised in the main thread, wherever it is; like an interruption no Exception."""


@contextmanager
def ended_when_stalled(
    limit_s: float, read_progress: Callable[[], Hashable], read_waits: Callable[[], Sequence[str]]
) -> Iterator[None]:
    """Raise RunStalled out of the block once `read_progress` gives the same answer for `limit_s`.

    The main thread is interrupted by SIGALRM, as a user's SIGINT would; a block in another thread runs unwatched,
    since nothing can interrupt it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(limit_s, read_progress, read_waits)
    before = signal.signal(signal.SIGALRM, watch.interrupt)
    thread = threading.Thread(target=watch.run, name="stall", daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            watch.ended.set()
    except _Alarm:
        raise RunStalled(watch.message) from None
    finally:
        watch.ended.set()
        thread.join()
        signal.signal(signal.SIGALRM, before)


class _Watch:
    """The thread that looks on, and what it says at last."""

    def __init__(
        self, limit_s: float, read_progress: Callable[[], Hashable], read_waits: Callable[[], Sequence[str]]
    ) -> None:
        self._limit_s = limit_s
        self._read_progress = read_progress
        self._read_waits = read_waits
        self.ended = threading.Event()
        self.message = ""

    def run(self) -> None:
        every_s = min(self._limit_s / 4, 5.0)
        progress, changed_s = self._read_progress(), time.monotonic()
        while not self.ended.wait(every_s):
            found = self._read_progress()
            if found != progress:
                progress, changed_s = found, time.monotonic()
            elif time.monotonic() - changed_s >= self._limit_s:
                self.message = self._describe()
                # again and again: an exception that is raised inside a destructor is dropped
                while not self.ended.wait(every_s):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                return

    def interrupt(self, *_: object) -> None:
        if self.message and not self.ended.is_set():
            raise _Alarm

    def _describe(self) -> str:
        waits = list(self._read_waits())
        shown = "; ".join(waits[:SHOWN_WAITS]) or "nothing that it knows of"
        more = f"; and {len(waits) - SHOWN_WAITS} more" if len(waits) > SHOWN_WAITS else ""
        return (
            f"no row was finished and no token drawn for {self._limit_s:g} s (cluster.stall_timeout_s); "
            f"waiting for {shown}{more}. What is committed is kept, and the same command continues"
        )
