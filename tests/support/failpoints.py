"""Failpoints: named points of a run at which a watcher may end, hold up or disturb the process that reaches them.

They are wrappers around the run's store and hosts, given to it by its wiring; the run itself knows nothing of them.
All of it is picklable, so that Ray's workers can run it.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from pipeline.protocol.hosts import Reply, Scores
from pipeline.protocol.messages import Candidates, Position, Step, Terms, TokenOutcome
from pipeline.runtime.wiring import Wiring
from pipeline.stores.store import Store, open_store


class Failpoint(StrEnum):
    """Where a process can die with the most at stake. The first two are a host's, the last the driver's."""

    MID_PREFILL = "mid prefill"
    MID_STEP = "mid step"
    BEFORE_DATA = "before data"
    AFTER_DATA = "after data"
    AFTER_COMMIT = "after commit"
    BEFORE_MANIFEST = "before manifest"


# Called with the point and what is at hand there: admissions, tokens, or a file's name.
Watcher = Callable[[Failpoint, object], None]


def watched(watch: Watcher | None) -> Wiring:
    """The wiring of a run that is watched at its failpoints."""
    return Wiring() if watch is None else Wiring(OpenWatchedStore(watch), WrapWatchedHost(watch))


@dataclass(frozen=True)
class OpenWatchedStore:
    """Opens stores whose writes are watched."""

    watch: Watcher

    def __call__(self, path: str) -> Store:
        return WatchedStore(open_store(path), self.watch)


@dataclass(frozen=True)
class WatchedStore:
    """Passes everything on to `store` and reports what is about to be written, or was."""

    store: Store
    watch: Watcher

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("store", "watch"):  # while it is unpickled it has neither
            raise AttributeError(name)
        return getattr(self.store, name)

    def create(self, name: str, data: bytes) -> bool:
        is_data = name.startswith("part-")
        if is_data:
            self.watch(Failpoint.BEFORE_DATA, name)
        created = self.store.create(name, data)
        if is_data:
            self.watch(Failpoint.AFTER_DATA, name)
        elif name.startswith("_commits/"):
            self.watch(Failpoint.AFTER_COMMIT, name)
        return created

    def put(self, name: str, data: bytes) -> None:
        if name == "_manifest.json":
            self.watch(Failpoint.BEFORE_MANIFEST, name)
        self.store.put(name, data)


@dataclass(frozen=True)
class WrapWatchedHost:
    """Puts a watcher around every host."""

    watch: Watcher

    def __call__(self, host: Scores) -> Any:
        return WatchedHost(host, self.watch)


class WatchedHost:
    """Passes everything on to `host` and reports the steps that it has computed."""

    def __init__(self, host: Any, watch: Watcher) -> None:
        self._host = host
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def advance(self, at: Position, step: Step) -> None:
        self._host.advance(at, step)
        self._report(step)

    def advance_and_propose(self, at: Position, step: Step, *args: Any, **options: Any) -> Candidates:
        proposal = self._host.advance_and_propose(at, step, *args, **options)
        self._report(step)
        return proposal

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        reply = self._host.advance_and_sample(at, step, slots, terms, uniforms)
        self._report(step)
        return reply

    def _report(self, step: Step) -> None:
        if step.admissions:
            self._watch(Failpoint.MID_PREFILL, step.admissions)
        if step.slots:
            self._watch(Failpoint.MID_STEP, step.tokens)


@dataclass(frozen=True)
class KillAt:
    """SIGKILL the process that reaches `point` for the `nth` time of all processes; once.

    `folder` counts, across processes and resumed commands.
    """

    point: Failpoint
    folder: Path
    nth: int = 1

    def __call__(self, point: Failpoint, detail: object) -> None:
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

    point: Failpoint

    def __call__(self, point: Failpoint, detail: object) -> None:
        if point is self.point:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KillSibling:
    """At `point`, once, SIGKILL the processes of this one's parent whose title begins with `title`."""

    title: str
    point: Failpoint
    folder: Path

    def __call__(self, point: Failpoint, detail: object) -> None:
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

    def __call__(self, point: Failpoint, detail: object) -> None:
        for watcher in self.watchers:
            watcher(point, detail)


@dataclass(frozen=True)
class Poison:
    """End a host's process, without a word, when it has prefilled a prompt with this token."""

    token: int

    def __call__(self, point: Failpoint, detail: object) -> None:
        if point is Failpoint.MID_PREFILL and any(
            self.token in prompt for admission in detail for prompt in admission.prompts.values()
        ):
            os._exit(1)


@dataclass(frozen=True)
class Hang:
    """Never go on from `point`."""

    point: Failpoint

    def __call__(self, point: Failpoint, detail: object) -> None:
        if point is self.point:
            time.sleep(3600)


@dataclass(frozen=True)
class Slow:
    """Take a while at `point`, so that a run lasts long enough to be disturbed."""

    point: Failpoint
    wait_s: float = 0.1

    def __call__(self, point: Failpoint, detail: object) -> None:
        if point is self.point:
            time.sleep(self.wait_s)


@dataclass(frozen=True)
class DiskFull:
    """From the first data file on, let that many syncs of files fail in this process, as on a full disk."""

    num_failures: int

    def __call__(self, point: Failpoint, detail: object) -> None:
        if point is Failpoint.BEFORE_DATA and not hasattr(os.fsync, "failures_left"):
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
