"""Stand-ins for `threading`, `queue`, `time`, `signal`, futures and random numbers in a simulated world.

Production modules get them in place of the real ones (`patches.py`): the same code then runs on simulated tasks.
"""

from __future__ import annotations

import queue
import signal
from collections import deque
from collections.abc import Callable
from typing import Any

from simulation.world import Process, Task, World


class Current:
    """The world of the schedule that runs."""

    world: World
    inject: Any
    disk: Any
    bucket: Any
    is_late: bool

    @classmethod
    def task(cls) -> Task:
        task = cls.world.current
        assert task is not None
        return task


class Waiters:
    """Tasks that wait for the same thing."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []

    def wait(self, is_there: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until something is there; returns whether it is."""
        world = Current.world
        ends_s = None if timeout_s is None else world.now_s + timeout_s
        task = Current.task()
        while not is_there():
            left_s = None if ends_s is None else ends_s - world.now_s
            if left_s is not None and left_s <= 0:
                return False
            self._tasks.append(task)
            try:
                world.block(left_s)
            finally:
                self._tasks.remove(task)
        return True

    def wake(self) -> None:
        for task in self._tasks:
            Current.world.wake(task)


class Event:
    """`threading.Event`."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiters = Waiters()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._waiters.wake()

    def wait(self, timeout: float | None = None) -> bool:
        return self._waiters.wait(self.is_set, timeout)


class Lock:
    """`threading.Lock` of blocks that do not wait: tasks give way where they wait alone."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Thread:
    """`threading.Thread`."""

    def __init__(self, *, target: Callable[[], Any], name: str = "thread", daemon: bool = False) -> None:
        self._target, self._name = target, name
        self._task: Task | None = None

    def start(self) -> None:
        self._task = Current.task().process.start(self._target, name=self._name)

    def join(self, timeout: float | None = None) -> None:
        task = self._task
        assert task is not None
        while not task.is_over:
            task.joined.append(Current.task())
            Current.world.block(timeout)


class Threading:
    """The module `threading`."""

    Event, Lock, Thread = Event, Lock, Thread

    @staticmethod
    def get_ident() -> int:
        return Current.task().ident

    @staticmethod
    def current_thread() -> Task:
        return Current.task()

    @staticmethod
    def main_thread() -> Task:
        return Current.task().process.tasks[0]


class SimpleQueue:
    """`queue.SimpleQueue`."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiters = Waiters()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._waiters.wake()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not self._items and not (block and self._waiters.wait(lambda: bool(self._items), timeout)):
            raise queue.Empty
        return self._items.popleft()


class Queue:
    """The module `queue`."""

    SimpleQueue, Empty = SimpleQueue, queue.Empty


class Future:
    """`concurrent.futures.Future`, as far as it is used."""

    def __init__(self) -> None:
        self._is_done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._waiters = Waiters()

    def set_result(self, value: Any) -> None:
        self._is_done, self._value = True, value
        self._waiters.wake()

    def set_exception(self, error: BaseException) -> None:
        self._is_done, self._error = True, error
        self._waiters.wake()

    def done(self) -> bool:
        return self._is_done

    def result(self, timeout: float | None = None) -> Any:
        if not self._waiters.wait(self.done, timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value


class Time:
    """The module `time`."""

    @staticmethod
    def monotonic() -> float:
        return Current.world.now_s

    perf_counter = monotonic

    @staticmethod
    def time() -> float:
        return Current.world.now_s + Current.world.clock_offset_s

    @staticmethod
    def sleep(seconds: float) -> None:
        Current.world.sleep(seconds)


class Signal:
    """The module `signal`."""

    SIGALRM, SIGINT, SIGTERM = signal.SIGALRM, signal.SIGINT, signal.SIGTERM

    @staticmethod
    def signal(number: int, handler: Any) -> Any:
        process = Current.task().process
        before = process.handlers.get(number)
        if handler is None:
            process.handlers.pop(number, None)
        else:
            process.handlers[number] = handler
        return before

    @staticmethod
    def pthread_kill(ident: int, number: int) -> None:
        for task in Current.task().process.tasks:
            if task.ident == ident:
                Current.world.interrupt(task, number)


class Secrets:
    """The module `secrets`."""

    @staticmethod
    def randbits(count: int) -> int:
        return Current.world.bits() & ((1 << count) - 1)

    @staticmethod
    def token_hex(count: int) -> str:
        return f"{Current.world.bits():016x}"[: 2 * count].rjust(2 * count, "0")


class Random:
    """The module `random`."""

    @staticmethod
    def random() -> float:
        return Current.world.bits() / 2**64

    @staticmethod
    def randrange(stop: int) -> int:
        return Current.world.bits() % stop

    @staticmethod
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * Random.random()


class WaitsByThread(dict[int, Any]):
    """`_wait_by_thread` of `pipeline.monitoring.waits`: one table for each process."""

    @property
    def _own(self) -> dict[int, Any]:
        process: Process = Current.task().process
        return process.waits

    def get(self, key: int, default: Any = None) -> Any:
        return self._own.get(key, default)

    def __setitem__(self, key: int, value: Any) -> None:
        self._own[key] = value

    def __delitem__(self, key: int) -> None:
        del self._own[key]

    def values(self) -> Any:
        return self._own.values()


class FoldersByProcess:
    """`_durable_folders` of `pipeline.stores.local_store`: one set for each process."""

    def __contains__(self, folder: Any) -> bool:
        return str(folder) in Current.task().process.folders

    def add(self, folder: Any) -> None:
        Current.task().process.folders.add(str(folder))
