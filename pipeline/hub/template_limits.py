"""Limits for chat templates. A model's template is a program: a sandbox keeps it from the machine, not from time.

A template that does not come to an end is interrupted in its own thread, which pays for it with CPU seconds: a busy
machine interrupts nothing that would have ended.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

CPU_S = 30.0  # of one text; usual ones take milliseconds
CHARACTERS = 64 * 2**20  # of one text, like the bytes of one record of the input
LOOK_S = 1.0
DELIVERY_S = 1.0  # Python raises an exception of another thread within milliseconds


class TemplateTooLong(Exception):
    """A template took too long, or wrote too much."""


@dataclass(slots=True)
class _Rendering:
    """A template that runs in a thread, and when its CPU clock says that it has had its time."""

    thread: int
    clock: int
    ends_s: float
    was_interrupted: bool = False


class _Watch:
    """Interrupts renderings of this process whose time is up, from a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._renderings: dict[int, _Rendering] = {}
        self._begun = threading.Event()
        self._is_running = False

    def begin(self, cpu_s: float) -> _Rendering:
        thread = threading.get_ident()
        rendering = _Rendering(thread, time.pthread_getcpuclockid(thread), time.thread_time() + cpu_s)
        with self._lock:
            self._renderings[id(rendering)] = rendering
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="templates", daemon=True).start()
        self._begun.set()
        return rendering

    def end(self, rendering: _Rendering) -> None:
        """After this a rendering is not interrupted; one that was gets its exception here at the latest."""
        with self._lock:
            self._renderings.pop(id(rendering), None)
        if rendering.was_interrupted:
            threading.Event().wait(DELIVERY_S)
            raise TemplateTooLong  # a library between has caught the first one

    def _run(self) -> None:
        while True:
            self._begun.wait()
            time.sleep(LOOK_S)
            with self._lock:
                for key, each in list(self._renderings.items()):
                    if time.clock_gettime(each.clock) >= each.ends_s:
                        del self._renderings[key]
                        each.was_interrupted = True
                        _raise_in(each.thread)
                if not self._renderings:
                    self._begun.clear()


_watch = _Watch()


def limited(render: Callable[[], str], *, cpu_s: float = CPU_S, characters: int = CHARACTERS) -> str:
    """The text that `render` makes of a template.

    Raises:
        TemplateTooLong: it took more than `cpu_s` seconds of CPU time, or wrote more than `characters`.
        Exception: whatever the template raises.
    """
    rendering = _watch.begin(cpu_s)
    try:
        try:
            text = render()
        finally:
            _watch.end(rendering)
    except TemplateTooLong:
        raise TemplateTooLong(f"it did not end within {cpu_s:g} s of CPU time") from None
    if len(text) > characters:
        raise TemplateTooLong(f"it wrote {len(text):,} characters, more than {characters:,}")
    return text


def _raise_in(thread: int) -> None:
    """Raise TemplateTooLong in a thread, at its next step in Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TemplateTooLong))
