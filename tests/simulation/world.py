"""A world in one process: simulated time, and processes made of tasks. One seed decides the order of it all.

A task is a greenlet: plain blocking code that gives way whenever it waits. Every wait is an await of the schedule, at
which its process may be killed. How long something takes is a hash of (seed, task, number of the wait), so that a
fault which is left out of a schedule leaves the others where they are.
"""

from __future__ import annotations

import heapq
import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import greenlet

FOREVER_S = 1e9
EVENTS_ALLOWED = 400_000  # of one schedule: more is an endless loop


class Killed(BaseException):
    """Ends every task of a process that was killed. Nothing that it does while it unwinds has any effect."""


class Endless(Exception):
    """A schedule did not come to its end: in too much simulated time, or in too many events."""


class Process:
    """A simulated process.

    Args:
        name: unique in its world.
        machine: where it runs.
        owner: dies with this process, some seconds later; None for none.
    """

    def __init__(self, world: World, name: str, machine: str, owner: Process | None = None) -> None:
        self.world, self.name, self.machine, self.owner = world, name, machine, owner
        self.is_alive = True
        self.tasks: list[Task] = []
        self.children: list[Process] = []
        self.waits: dict[int, Any] = {}  # what `pipeline.monitoring.waits` keeps for a process
        self.folders: set[str] = set()  # what `pipeline.stores.local_store` knows
        self.handlers: dict[int, Callable[..., Any]] = {}  # of signals
        self.at_death: list[Callable[[], None]] = []
        self.actor_id = name
        world.processes.append(self)
        world.has_news = True
        if owner is not None:
            owner.children.append(self)

    @property
    def driver(self) -> Process:
        """The process that everything here belongs to."""
        return self if self.owner is None else self.owner.driver

    def start(self, function: Callable[[], Any], *, name: str = "main") -> Task:
        """Run a function in a task of its own."""
        task = Task(self, f"{self.name}/{name}{len(self.tasks) or ''}", function)
        self.tasks.append(task)
        self.world.wake(task)
        return task

    def kill(self, *, is_end: bool = False) -> None:
        """End the process at once, as SIGKILL does. Of those it owns the world sees to it a little later."""
        if not self.is_alive:
            return
        world = self.world
        self.is_alive = False
        world.has_news = True
        if not is_end:
            world.log(f"{self.name} is killed")
        for task in self.tasks:
            if task is not world.current and not task.is_over:
                world.wake(task)
        for notify in self.at_death:
            notify()
        for child in self.children:
            world.after(4.0 * world.unit(child.name), child.kill)
        if world.current is not None and world.current.process is self and not is_end:
            raise Killed


class Task:
    """A thread of a simulated process."""

    def __init__(self, process: Process, name: str, function: Callable[[], Any]) -> None:
        self.process, self.name, self._function = process, name, function
        self.key = f"{process.world.seed}:{name}:".encode()
        self.num_waits = 0
        self.turn = 0  # which of its waits a wake-up is for
        self.is_over = False
        self.signals: deque[int] = deque()
        self.joined: list[Task] = []
        self.greenlet = greenlet.greenlet(self._run, parent=process.world.hub)

    @property
    def ident(self) -> int:
        return id(self)

    def _run(self, _: Any) -> None:
        process = self.process
        try:
            if process.is_alive:
                self._function()
        except Killed:
            pass
        except BaseException as error:
            if process.is_alive and self is not process.tasks[0]:
                process.world.violate(f"{self.name} ended with {type(error).__name__}: {error}")
        self.is_over = True
        for other in self.joined:
            process.world.wake(other)
        if self is process.tasks[0]:
            process.kill(is_end=True)


class World:
    """Time, tasks and faults of one schedule.

    Args:
        seed: decides how long everything takes.
        at_await: called at a wait with its number and task; it may kill the task's process. It returns the number of
            the wait at which it is to be called next.
    """

    def __init__(self, seed: int, at_await: Callable[[int, Task], float] = lambda number, task: math.inf) -> None:
        self.seed = seed
        self.now_s = 0.0
        self.clock_offset_s = 1_800_000_000.0  # of the wall clock, which may jump
        self.processes: list[Process] = []
        self.current: Task | None = None
        self.num_awaits = self.num_events = self.num_actors = 0
        self.has_news = True  # whether somebody began or ended
        self.violations: list[str] = []
        self.lines: list[str] = []
        self.keeps_log = False
        self._at_await = at_await
        self._next_at_await: float = 0
        self._events: list[tuple[float, int, Any, int]] = []
        self._numbers = itertools.count()
        self.hub = greenlet.getcurrent()
        self._random = 0

    # what decides

    def unit(self, key: str) -> float:
        """A number in [0, 1) that belongs to a name."""
        return zlib.crc32(f"{self.seed}:{key}".encode()) / 2**32

    def bits(self) -> int:
        """The next random number of 64 bits, for what production code draws itself."""
        self._random += 1
        key = f"{self.seed}:{self._random}:{'' if self.current is None else self.current.name}".encode()
        return zlib.crc32(key) << 32 | zlib.crc32(key + b"+")

    def violate(self, what: str) -> None:
        """Note something that must never happen."""
        self.log(f"VIOLATION: {what}")
        self.violations.append(what)

    def log(self, line: str) -> None:
        if self.keeps_log:
            who = "" if self.current is None else f"{self.current.name}: "
            self.lines.append(f"{self.now_s:9.3f}  {who}{line}")

    # time

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        """Call a function that does not wait, later."""
        heapq.heappush(self._events, (self.now_s + seconds, next(self._numbers), function, -1))

    def wake(self, task: Task, *, after_s: float = 0.0) -> None:
        """Let a task go on from its present wait."""
        heapq.heappush(self._events, (self.now_s + after_s, next(self._numbers), task, task.turn))

    def block(self, timeout_s: float | None = None) -> bool:
        """Wait until `wake` or a signal, whose handler is run; returns whether that came before the timeout."""
        task = self.current
        assert task is not None, "only a task can wait"
        process = task.process
        if not process.is_alive:
            raise Killed
        self.num_awaits += 1
        if self.num_awaits >= self._next_at_await:
            self._next_at_await = self._at_await(self.num_awaits, task)
        until_s = self.now_s + (FOREVER_S if timeout_s is None else timeout_s)
        if not task.signals:
            task.turn += 1
            if timeout_s is not None:
                heapq.heappush(self._events, (until_s, next(self._numbers), task, task.turn))
            self.hub.switch()
            if not process.is_alive:
                raise Killed
        while task.signals:
            number = task.signals.popleft()
            if (handler := process.handlers.get(number)) is not None:
                handler(number, None)
        return self.now_s < until_s

    def hang(self) -> None:
        """Wait for ever: until the process is killed, or the handler of a signal raises something."""
        while True:
            self.block()

    def pause(self, seconds: float) -> None:
        """Take some time: between half of it and one and a half."""
        task = self.current
        assert task is not None
        if not task.process.is_alive:
            raise Killed
        task.num_waits += 1
        self.sleep(seconds * (0.5 + zlib.crc32(b"%b%d" % (task.key, task.num_waits)) / 2**32))

    def sleep(self, seconds: float) -> None:
        """Take exactly so much time."""
        until_s = self.now_s + seconds
        while (left_s := until_s - self.now_s) > 0 and self.block(left_s):
            pass

    def interrupt(self, task: Task, number: int) -> None:
        """Deliver a signal to a task: its handler runs where it waits."""
        if not task.is_over and number in task.process.handlers:
            task.signals.append(number)
            self.wake(task)

    # the loop

    def run(self, until: Callable[[], bool], *, limit_s: float) -> None:
        """Let everything happen until `until`, which may change when a process begins or ends.

        Raises:
            Endless: after `limit_s` of simulated time.
        """
        events, pop = self._events, heapq.heappop
        self.has_news = True
        while events:
            if self.has_news:
                self.has_news = False
                if until():
                    return
            time_s, _, what, turn = pop(events)
            if time_s > limit_s:
                raise Endless(f"no end after {limit_s:,.0f} simulated seconds")
            self.num_events += 1
            if self.num_events > EVENTS_ALLOWED:
                raise Endless(f"no end after {EVENTS_ALLOWED:,} events, {self.now_s:,.0f} simulated seconds")
            if turn < 0:
                self.now_s = time_s
                what()
            elif not what.is_over and (what.turn == turn or not what.process.is_alive):
                self.now_s = time_s
                self.current = what
                what.greenlet.switch(None)
                self.current = None
        if not until():
            raise Endless("everybody waits and nothing is to come")

    def stop(self) -> None:
        """Kill every process, let its tasks unwind, and know none of them any more."""
        for process in self.processes:
            process.kill(is_end=True)
        self._events.clear()
        for process in self.processes:
            for task in process.tasks:
                while not task.is_over:
                    self.current = task
                    task.greenlet.switch(None)
                    self.current = None
        for process in self.processes:  # so that most of it goes without being looked for
            process.tasks.clear()
            process.children.clear()
            process.at_death.clear()
        self.processes.clear()
