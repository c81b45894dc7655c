"""Watchers that end or hold up processes at named points; picklable, so that Ray's workers can run them."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.points import Point, Watcher


@dataclass(frozen=True)
class KillAt:
    """SIGKILL the process that reaches `point` for the `nth` time of all processes; once.

    `folder` counts, across processes and resumed commands.
    """

    point: Point
    folder: Path
    nth: int = 1

    def __call__(self, point: Point, detail: object) -> None:
        if point is self.point and self._take_number() == self.nth:
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def has_killed(self) -> bool:
        return self._file(self.nth).exists()

    def _take_number(self) -> int:
        number = 1
        while True:
            try:
                self._file(number).touch(exist_ok=False)
                return number
            except FileExistsError:
                number += 1

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.point.replace(' ', '-')}-{number}"


@dataclass(frozen=True)
class KillAlways:
    """SIGKILL every process that reaches `point`."""

    point: Point

    def __call__(self, point: Point, detail: object) -> None:
        if point is self.point:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KillSibling:
    """At `point`, once, SIGKILL the processes of this one's parent whose title begins with `title`."""

    title: str
    point: Point
    folder: Path

    def __call__(self, point: Point, detail: object) -> None:
        done = self.folder / "siblings-killed"
        if point is not self.point or done.exists():
            return
        done.touch()
        for process in psutil.Process().parent().children():
            if process.cmdline()[:1] and process.cmdline()[0].startswith(self.title):
                process.kill()


@dataclass(frozen=True)
class AllOf:
    """Several watchers at once."""

    watchers: tuple[Watcher, ...]

    def __call__(self, point: Point, detail: object) -> None:
        for watcher in self.watchers:
            watcher(point, detail)


@dataclass(frozen=True)
class Poison:
    """End a host's process, without a word, when it has prefilled a prompt with this token."""

    token: int

    def __call__(self, point: Point, detail: object) -> None:
        if point is Point.MID_PREFILL and any(
            self.token in prompt for admission in detail for prompt in admission.prompts.values()
        ):
            os._exit(1)


@dataclass(frozen=True)
class Hang:
    """Never go on from `point`."""

    point: Point

    def __call__(self, point: Point, detail: object) -> None:
        if point is self.point:
            time.sleep(3600)


@dataclass(frozen=True)
class Slow:
    """Take a while at `point`, so that a run lasts long enough to be disturbed."""

    point: Point
    wait_s: float = 0.1

    def __call__(self, point: Point, detail: object) -> None:
        if point is self.point:
            time.sleep(self.wait_s)


@dataclass(frozen=True)
class DiskFull:
    """From the first data file on, let that many syncs of files fail in this process, as on a full disk."""

    num_failures: int

    def __call__(self, point: Point, detail: object) -> None:
        if point is Point.BEFORE_DATA and not hasattr(os.fsync, "failures_left"):
            os.fsync = _FullSync(os.fsync, self.num_failures)


class _FullSync:
    """Stands for os.fsync."""

    def __init__(self, sync: Callable[[int], None], failures_left: int) -> None:
        self._sync = sync
        self.failures_left = failures_left

    def __call__(self, descriptor: int) -> None:
        if self.failures_left > 0:
            self.failures_left -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._sync(descriptor)
