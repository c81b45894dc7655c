"""The faults of a schedule: every kind, when one occurs, and which errors it may end a command with."""

from __future__ import annotations

import errno
import math
import os
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from support.failpoints import Failpoint

from simulation.threads import Current, Signal
from simulation.world import Process, Task

ANYWHERE = frozenset(("disk", "s3"))
DISK, S3 = frozenset(("disk",)), frozenset(("s3",))
BOTH = frozenset(("local", "ray"))
RAY = frozenset(("ray",))
LOST = ("HostError", "CageError", "RunStalled")  # what processes and calls that are lost may end a command with
STORED = ("StorageError", "CageError", "ConfigurationError")


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        trigger: what is counted until it occurs: awaits, points, storage operations, messages, steps that hosts are
            told to do, steps that they do, or "lasting" for one that is there from the start, until somebody repairs
            it.
        most: the largest number at which it occurs.
        errors: the classes of errors that a command may end with because of it.
        stores: with which stores it can occur.
        transports: likewise.
        on: the storage operations that it disturbs.
        sizes: how often, or for how many seconds; one of them.
        fails_hosts: whether the coordinator sees a host fail.
    """

    trigger: str
    most: int
    errors: tuple[str, ...] = ()
    stores: frozenset[str] = ANYWHERE
    transports: frozenset[str] = BOTH
    on: tuple[str, ...] = ()
    sizes: tuple[float, ...] = (1,)
    fails_hosts: bool = False


EVERY = ("read", "write", "entry", "sync", "list")
OFTEN = (1, 1, 2, 3, 4, 8)
KINDS = {
    # processes
    "kill": Kind("await", 3000, LOST, fails_hosts=True),
    "kill at point": Kind("point", 6, LOST, fails_hosts=True),
    "node lost": Kind("await", 3000, LOST, transports=RAY, fails_hosts=True),
    "power cut": Kind("await", 3000),
    "power cut at the end": Kind("end", 0, stores=DISK),
    "interrupt": Kind("await", 3000, ("Interrupted",)),
    "clock jumps": Kind("await", 3000, sizes=(-7200.0, -2.0, 700.0, 86400.0)),
    # a folder
    "disk full": Kind("storage", 500, STORED, DISK, on=("write",), sizes=OFTEN),
    "disk error": Kind("storage", 500, STORED, DISK, on=EVERY, sizes=OFTEN),
    "stale handle": Kind("storage", 500, STORED, DISK, on=("read", "list"), sizes=OFTEN),
    "link times out after it was made": Kind("storage", 500, STORED, DISK, on=("linked",), sizes=OFTEN),
    "slow disk": Kind("storage", 500, (*STORED, "RunStalled"), DISK, on=EVERY, sizes=(5.0, 30.0)),
    "disk hangs": Kind("storage", 500, (*STORED, *LOST), DISK, on=EVERY),
    # an object store
    "server error": Kind("storage", 120, STORED, S3, on=EVERY, sizes=OFTEN),
    "throttled": Kind("storage", 120, STORED, S3, on=EVERY, sizes=OFTEN),
    "request times out": Kind("storage", 120, STORED, S3, on=EVERY, sizes=OFTEN),
    "request times out after it took effect": Kind("storage", 120, STORED, S3, on=("answered",), sizes=OFTEN),
    "credentials expire": Kind("storage", 120, STORED, S3, on=EVERY, sizes=(3.0, 20.0)),
    "listings are stale": Kind("storage", 120, STORED, S3, on=EVERY, sizes=(1.0, 10.0)),
    # calls between processes
    "call delayed": Kind("message", 300, LOST, transports=RAY, sizes=(0.3, 3.0, 15.0), fails_hosts=True),
    "call lost": Kind("message", 300, LOST, transports=RAY, fails_hosts=True),
    "reply lost": Kind("message", 300, LOST, transports=RAY, fails_hosts=True),
    "call repeated": Kind("message", 300, transports=RAY, sizes=(0.0, 0.05, 0.3)),
    "step repeated": Kind("step", 30, transports=RAY, sizes=(0.0, 0.05, 0.3)),
    "calls swapped": Kind("message", 300, LOST, transports=RAY, fails_hosts=True),
    # hosts
    "host dies": Kind("host", 60, LOST, transports=RAY, fails_hosts=True),
    "host hangs": Kind("host", 60, LOST, fails_hosts=True),
    "host is slow": Kind("host", 60, LOST, sizes=(2.0, 8.0), fails_hosts=True),
    "host fails": Kind("host", 60, LOST, fails_hosts=True),
    "host forgets": Kind("advance", 60),
    "host has no memory": Kind("host", 60),
    # what lasts until it is repaired
    "no hard links": Kind("lasting", 0, ("StorageError",), DISK),
    "creates are not exclusive": Kind("lasting", 0, ("ConfigurationError",)),
    "disk stays full": Kind("lasting", 0, STORED, DISK),
    "credentials stay expired": Kind("lasting", 0, STORED, S3),
    "hosts never load": Kind("lasting", 0, LOST, fails_hosts=True),
    "hosts hang for good": Kind("lasting", 0, LOST, fails_hosts=True),
    "replicas die at every commit": Kind("lasting", 0, LOST, transports=RAY),
    "a row kills its host": Kind("lasting", 0, LOST, transports=RAY, fails_hosts=True),
    "no row may fail": Kind("lasting", 0, ("ErrorBudgetExceeded",)),
    "other bits": Kind("lasting", 0, ("NondeterminismError",)),
}
ROW_FAILS = ("alone at last", "no memory for it even when it is decoded alone")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        kind: of `KINDS`.
        at: the number of the event at which it occurs.
        size: how often or for how long.
        point: of "kill at point".
    """

    kind: str
    at: int = 0
    size: float = 1
    point: str = ""

    def __str__(self) -> str:
        trigger = KINDS[self.kind].trigger
        where = "" if trigger in ("lasting", "end") else f" at {self.point or trigger} {self.at}"
        return f"{self.kind}{where}" + (f" (size {self.size:g})" if len(KINDS[self.kind].sizes) > 1 else "")


def draw_faults(chance: random.Random, *, store: str, transport: str) -> tuple[Fault, ...]:
    """The faults of a schedule: some that pass, in some schedules one that lasts."""
    possible = [name for name, kind in KINDS.items() if store in kind.stores and transport in kind.transports]
    passing = [name for name in possible if KINDS[name].trigger != "lasting"]
    lasting = [name for name in possible if KINDS[name].trigger == "lasting"]
    has_lasting = chance.random() < 0.2
    count = chance.choice((0, 0, 1, 2)) if has_lasting else chance.choice((1, 1, 2, 2, 3, 4, 6))
    names = [chance.choice(lasting)] if has_lasting else []
    names += [chance.choice(["kill", "kill at point", *passing]) for _ in range(count)]
    return tuple(_draw(chance, name) for name in names)


def _draw(chance: random.Random, name: str) -> Fault:
    kind = KINDS[name]
    at = int(kind.most ** chance.random()) if kind.most > 10 else chance.randint(1, max(1, kind.most))
    point = chance.choice(list(Failpoint)) if kind.trigger == "point" else ""
    return Fault(name, at, chance.choice(kind.sizes), str(point))


@dataclass
class Inject:
    """Makes the faults of a schedule occur, and notes which did."""

    faults: Collection[Fault]
    fired: list[Fault] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    is_calm: bool = False  # faults are over: the operator looks at the result

    def __post_init__(self) -> None:
        self._waiting: dict[str, list[Fault]] = {}
        for fault in self.faults:
            self._waiting.setdefault(KINDS[fault.kind].trigger, []).append(fault)
        self._left: dict[int, float] = {}
        self._until_s: dict[int, float] = {}
        self._stale: list[tuple[float, float]] = []
        self.lasting = {fault.kind for fault in self._waiting.get("lasting", ())}
        self.cut_power: Any = None  # set by the schedule
        self.is_refilled = False

    def has(self, kind: str) -> bool:
        """Whether something that lasts is there now."""
        if kind in self.lasting and not self.is_calm:
            self.note(next(fault for fault in self._waiting["lasting"] if fault.kind == kind))
            return True
        return False

    def repair(self) -> None:
        """What lasts is mended."""
        self.lasting.clear()

    def note(self, fault: Fault) -> None:
        if fault not in self.fired:
            self.fired.append(fault)
            Current.world.log(f"FAULT {fault}")

    def _due(self, trigger: str) -> Fault | None:
        """The fault of a trigger whose turn it is at this event."""
        number = self.counts[trigger] = self.counts.get(trigger, 0) + 1
        waiting = self._waiting.get(trigger)
        if not waiting or self.is_calm:
            return None
        for fault in waiting:
            if fault.at == number:
                waiting.remove(fault)
                self.note(fault)
                return fault
        return None

    # awaits

    def at_await(self, number: int, task: Task) -> float:
        """Let the faults occur whose turn it is; returns the number of the await at which the next one's is."""
        waiting = self._waiting.get("await", [])
        if self.is_calm:
            return math.inf
        for fault in list(waiting):
            if number >= fault.at:
                waiting.remove(fault)
                self.note(fault)
                self._strike(fault, task.process)
        return min((fault.at for fault in waiting), default=math.inf)

    def _strike(self, fault: Fault, process: Process) -> None:
        world = Current.world
        if fault.kind == "kill":
            process.kill()
        elif fault.kind == "clock jumps":
            world.clock_offset_s += fault.size
        elif fault.kind == "interrupt":
            world.interrupt(process.driver.tasks[0], Signal.SIGINT)
        elif fault.kind == "power cut":
            self.cut_power()
        elif fault.kind == "node lost":
            self.lose_node(process)

    def lose_node(self, process: Process) -> None:
        """All processes of a worker machine die: that of `process`, or of one of its children."""
        world = Current.world
        machines = [each.machine for each in (process, *world.processes) if each.machine[0] == "w" and each.is_alive]
        victims = [each for each in world.processes if machines and each.machine == machines[0] and each.is_alive]
        for victim in sorted(victims, key=lambda each: each is process):  # the one that runs comes last
            victim.kill()

    # points

    def at_point(self, point: Failpoint, detail: object) -> None:
        """The watcher of the shared failpoints (`support.failpoints`)."""
        world = Current.world
        if world.current is None:
            return
        number = self.counts[point] = self.counts.get(point, 0) + 1
        for fault in list(self._waiting.get("point", ())):
            if fault.point == point and fault.at == number and not self.is_calm:
                self._waiting["point"].remove(fault)
                self.note(fault)
                world.current.process.kill()
        if point is Failpoint.BEFORE_DATA and self.has("replicas die at every commit"):
            world.current.process.kill()

    # storage

    def storage(self, operation: str, path: str) -> None:
        """A storage operation of some kind is about to take effect; "linked" and "answered": it just did."""
        if self.is_calm:
            return
        number = self.counts["storage"] = self.counts.get("storage", 0) + 1
        if self.lasting:
            if operation == "write" and self.has("disk stays full"):
                raise _disk(errno.ENOSPC, path)
            if operation in EVERY and self.has("credentials stay expired"):
                raise PermissionError("The provided token has expired.")
        for fault in self._waiting.get("storage", ()):
            kind = KINDS[fault.kind]
            if number >= fault.at and operation in kind.on:
                self._disturb(fault, path)

    def _disturb(self, fault: Fault, path: str) -> None:
        world, key = Current.world, id(fault)
        lasts = fault.kind in ("credentials expire", "listings are stale")
        if lasts:
            until_s = self._until_s.setdefault(key, world.now_s + fault.size)
            if world.now_s >= until_s:
                return
        else:
            once = fault.kind in ("slow disk", "disk hangs")
            left = self._left.get(key, 1 if once else fault.size)
            if left <= 0:
                return
            self._left[key] = left - 1
        self.note(fault)
        match fault.kind:
            case "disk full":
                raise _disk(errno.ENOSPC, path)
            case "disk error":
                raise _disk(errno.EIO, path)
            case "stale handle":
                raise _disk(errno.ESTALE, path)
            case "link times out after it was made":
                raise _disk(errno.ETIMEDOUT, path)
            case "slow disk":
                world.sleep(fault.size)
            case "disk hangs":
                world.hang()
            case "server error":
                raise OSError(errno.EREMOTEIO, "We encountered an internal error. Please try again.")
            case "throttled":
                raise OSError(errno.EBUSY, "Please reduce your request rate.")
            case "request times out" | "request times out after it took effect":
                raise TimeoutError("Read timeout on endpoint URL")
            case "credentials expire":
                raise PermissionError("The provided token has expired.")

    def staleness_s(self) -> float:
        """How old the listings of an object store are now."""
        if self.is_calm:
            return 0.0
        stale = [fault for fault in self._waiting.get("storage", ()) if fault.kind == "listings are stale"]
        now_s = Current.world.now_s
        return max((each.size for each in stale if now_s < self._until_s.get(id(each), 0.0)), default=0.0)

    # calls

    def message(self, method: str) -> Fault | None:
        """The fault of the next call between two processes, or None."""
        step = self._due("step") if method.startswith("advance") else None
        return self._due("message") or step

    def host_forgets(self) -> bool:
        """Whether a host loses its state before its next step."""
        return self._due("advance") is not None

    def host_call(self, process: Process) -> None:
        """A host computes a step: it may die, hang, be slow or fail."""
        world = Current.world
        if self.has("hosts hang for good"):
            world.hang()
        fault = self._due("host")
        match fault.kind if fault else "":
            case "host dies":
                process.kill()
            case "host hangs":
                world.hang()
            case "host is slow":
                assert fault is not None
                world.sleep(fault.size)
            case "host fails":
                raise RuntimeError("device-side assert triggered")
            case "host has no memory":
                raise MemoryError("can't allocate memory")


def _disk(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
