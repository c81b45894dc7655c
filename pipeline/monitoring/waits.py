"""What each thread of a process waits for, so that a run without progress can report why."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait of one thread.

    Args:
        what: it waits for.
        since_s: when it began, in monotonic seconds of its process.
    """

    what: str
    since_s: float


_wait_by_thread: dict[int, Wait] = {}


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Report what this thread waits for while the block runs; afterwards an outer wait is reported again."""
    thread = threading.get_ident()
    outer = _wait_by_thread.get(thread)
    _wait_by_thread[thread] = Wait(what, time.monotonic())
    try:
        yield
    finally:
        if outer is None:
            del _wait_by_thread[thread]
        else:
            _wait_by_thread[thread] = outer


def waits() -> list[str]:
    """What the threads of this process wait for and for how long, longest first."""
    now_s = time.monotonic()
    ordered = sorted(_wait_by_thread.values(), key=lambda wait: wait.since_s)
    return [f"{wait.what} ({now_s - wait.since_s:.0f} s)" for wait in ordered]
