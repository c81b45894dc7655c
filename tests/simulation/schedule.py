"""A schedule: a job, drivers and faults, drawn from a seed; and its run, from the first command to the last check."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import random
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from support.failpoints import WatchedStore, WrapWatchedHost

from pipeline.config.sections import Config
from pipeline.errors import CageError, Interrupted
from pipeline.runtime.wiring import Wiring
from pipeline.stages.relabel import relabel
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.store import Store
from simulation import checks, memo
from simulation.bucket import Bucket
from simulation.disk import Disk
from simulation.faults import Fault, Inject, draw_faults
from simulation.ledger import Ledger
from simulation.patches import collect
from simulation.paths import Path as SimulatedPath
from simulation.threads import Current, Signal
from simulation.world import Endless, Killed, Process, World

COMMAND_S = 1500.0  # simulated seconds in which every command ends, whatever happens to it
GARBAGE_ALLOWED = 200_000  # objects, of the schedules since garbage was collected
SPINS_S = 3.0  # of CPU time in one task without a wait
NOWHERE = Path("nowhere")
REFUSED = {"creates are not exclusive", "no hard links"}  # stores that no run may begin in


@dataclass(frozen=True)
class Schedule:
    """All that decides what happens.

    Args:
        seed: of everything that takes time.
        transport: "local" or "ray".
        store: "disk" or "s3".
        topology: "lone", a host that samples, or "pair", a host that proposes and one beside it.
        slots: rows at once.
        replicas: over Ray.
        is_late: whether a lone host's outcomes come by a second call.
        has_drafts: whether a model proposes tokens, to all drivers but every third one.
        starts_s: when each of the first drivers is started.
        faults: what goes wrong.
    """

    seed: int
    transport: str
    store: str
    topology: str
    slots: int
    replicas: int
    is_late: bool
    has_drafts: bool
    starts_s: tuple[float, ...]
    faults: tuple[Fault, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        tree = json.loads(text)
        faults = tuple(Fault(**each) for each in tree["faults"])
        return cls(**{**tree, "starts_s": tuple(tree["starts_s"]), "faults": faults})

    def __str__(self) -> str:
        job = f"seed {self.seed}: {self.transport}, {self.store}, {self.topology}, {self.slots} slots"
        drivers = ", ".join(f"{each:.1f} s" for each in self.starts_s)
        lines = [f"{job}, {self.replicas} replicas{self._more}; drivers start at {drivers}"]
        return "\n".join([*lines, *(f"  {fault}" for fault in self.faults)])

    @property
    def _more(self) -> str:
        return f"{', late' if self.is_late else ''}{', drafts' if self.has_drafts else ''}"


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    chance = random.Random(seed)
    transport = chance.choice(("local", "ray"))
    store = chance.choice(("disk", "disk", "s3"))
    topology = chance.choice(("lone", "lone", "pair"))
    faults = draw_faults(chance, store=store, transport=transport)
    has_other_bits = any(fault.kind == "other bits" for fault in faults)
    num_drivers = chance.choice((2, 3) if has_other_bits else (1, 1, 1, 2, 2, 3))
    starts_s = tuple(round(chance.uniform(0, 3), 2) if at else 0.0 for at in range(num_drivers))
    return Schedule(
        seed,
        transport,
        store,
        topology,
        chance.choice((2, 3, 8)),
        chance.choice((1, 2)) if transport == "ray" else 1,
        chance.random() < 0.5,
        chance.random() < 0.5,
        starts_s,
        faults,
    )


@dataclass
class Ending:
    """How a command ended.

    Args:
        name: of its driver.
        kind: the class of its error; "" where it ended well, "killed" where it did not end by itself.
        code: its exit code.
        message: of the error.
    """

    name: str
    kind: str
    code: int
    message: str = ""


@dataclass
class Result:
    """What a schedule came to."""

    schedule: Schedule
    violations: list[str] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    fired: list[Fault] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    num_events: int = 0
    seconds: float = 0.0
    trace: int = 0
    num_accepted: int = 0  # tokens that were proposed and drawn


@dataclass(frozen=True)
class ComparingStore(WatchedStore):
    """Notes which drivers computed other bytes for a data file that is there."""

    simulation: Simulation

    def __post_init__(self) -> None:
        vars(self).update(
            {name: getattr(self.store, name) for name in ("read", "read_many", "names", "remove", "url")}
        )

    def create(self, name: str, data: bytes) -> bool:
        standing = self.simulation.read(name)
        if name.startswith("part-") and standing is not None and standing != data:
            self.simulation.differing.add(Current.task().process.driver.name)
        return super().create(name, data)


class Simulation:
    """One run of a schedule. Use it inside `patches.simulated`."""

    def __init__(self, schedule: Schedule, *, keeps_log: bool = False) -> None:
        self.schedule = schedule
        self.inject = Inject(schedule.faults)
        self.world = World(schedule.seed, self.inject.at_await)
        self.world.keeps_log = keeps_log
        self.address = memo.ADDRESSES[schedule.store]
        self.disk = Disk(self.inject, self._changed)
        self.bucket = Bucket(self.inject, self._changed)
        self.inject.cut_power = self.cut_power
        self.endings: list[Ending] = []
        self.num_drivers = 0
        self.differing: set[str] = set()  # drivers that computed other bytes than those that are there
        self.plan = memo.prepare(self.config, NOWHERE).plan
        self.ledger = Ledger(self.read, len(self.plan.shards))
        self.trace = 0
        self.bind()

    def bind(self) -> None:
        Current.world, Current.inject = self.world, self.inject
        Current.disk, Current.bucket, Current.is_late = self.disk, self.bucket, self.schedule.is_late

    @property
    def config(self) -> Config:
        """The configuration of the next command."""
        job = self.schedule
        budget = 0 if "no row may fail" in self.inject.lasting else len(memo.ROWS)
        has_drafts = job.has_drafts and self.num_drivers % 3 != 0
        return memo.make_config(job.store, job.topology, job.transport, job.slots, job.replicas, budget, has_drafts)

    # the store

    @property
    def root(self) -> str:
        return self.address.removeprefix("s3://")

    def read(self, name: str) -> bytes | None:
        if self.schedule.store == "disk":
            return self.disk.bytes_of(f"{self.root}/{name}")
        return self.bucket.objects.get(f"{self.root}/{name}")

    def files(self) -> dict[str, bytes]:
        """The run's files by name."""
        found = self.disk.files(self.root) if self.schedule.store == "disk" else self.bucket.objects
        return {path.removeprefix(f"{self.root}/"): data for path, data in sorted(found.items())}

    def _changed(self, path: str, data: bytes | None) -> None:
        self.world.log(f"{'removed' if data is None else 'wrote'} {path}")
        if "/part-" in path and self.inject.lasting & REFUSED:
            self.world.violate(f"{path} was written to a store that is to be refused")
        if path.startswith(f"{self.root}/"):
            self.ledger.changed(path.removeprefix(f"{self.root}/"), data)

    def open_store(self, address: str) -> Store:
        if address.startswith("s3://"):
            self.bucket.has_conditions = not self.inject.has("creates are not exclusive")
            return ObjectStore("s3", address.removeprefix("s3://"))
        self.disk.has_links = not self.inject.has("no hard links")
        self.disk.is_exclusive = not self.inject.has("creates are not exclusive")
        folder: Any = SimulatedPath(address, self.disk)
        return LocalStore(folder)

    def cut_power(self) -> None:
        """The machine of the drivers, and of the disk, loses its power: everything on it dies."""
        world = self.world
        world.log("the power is cut")
        for process in world.processes:
            if world.current is None or process is not world.current.process:
                process.kill()
        self.disk.cut_power()
        self.ledger.power_was_cut()
        if world.current is not None:
            world.current.process.kill()

    # commands

    def wiring(self) -> Wiring:
        return Wiring(
            lambda address: ComparingStore(self.open_store(address), self._at_point, self),
            WrapWatchedHost(self._at_point),
        )

    def _at_point(self, point: Any, detail: object) -> None:
        if point == "after commit":
            self.ledger.acknowledged.add(str(detail))
        self.inject.at_point(point, detail)

    def start(self) -> Process:
        """Start the command: a driver of its own."""
        self.num_drivers += 1
        process = Process(self.world, f"d{self.num_drivers}", "driver")
        process.handlers[Signal.SIGINT] = _interrupted
        wiring, config = self.wiring(), self.config
        self.inject.has("no row may fail")

        def command() -> None:
            out = io.StringIO()
            self.endings.append(ended := Ending(process.name, "killed", -9))
            try:
                relabel(config, NOWHERE, out, wiring=wiring)
                ended.kind, ended.code = "", 0
            except CageError as error:
                ended.kind, ended.code, ended.message = type(error).__name__, int(error.exit_code), str(error)
            except Interrupted as error:
                ended.kind, ended.code, ended.message = "Interrupted", int(error.exit_code), "interrupted"
            except Killed:
                raise
            except Exception as error:
                ended.kind, ended.code, ended.message = type(error).__name__, 1, str(error)
                self.world.violate(f"{process.name} ended with a traceback: {type(error).__name__}: {error}")
            self.world.log(f"{process.name} ends with {ended.code} {ended.kind} {ended.message}")

        process.start(command)
        return process

    def wait(self, processes: list[Process]) -> None:
        """Let commands end, and what they leave behind."""
        self.world.run(
            lambda: not any(process.is_alive for process in processes), limit_s=self.world.now_s + COMMAND_S
        )

    def run(self) -> None:
        """Start the drivers, let them end; then start the command again until it ends well."""
        world, processes = self.world, []

        def start() -> None:
            processes.append(self.start())

        for start_s in self.schedule.starts_s:
            world.after(start_s, start)
        count = len(self.schedule.starts_s)
        world.run(
            lambda: len(processes) == count and not any(each.is_alive for each in processes),
            limit_s=COMMAND_S,
        )
        self.inject.repair()
        if any(fault.kind == "other bits" for fault in self.schedule.faults):
            return  # what one machine began, only machines of its kind can end
        tries = 2 + len(self.schedule.faults)
        while not self._is_done():
            if not tries:
                world.violate("the run did not end although its command was started again and again")
                return
            tries -= 1
            self.wait([self.start()])
        self._end()

    def _is_done(self) -> bool:
        return bool(self.endings) and self.endings[-1].code == 0

    def _end(self) -> None:
        """What is left behind goes on for a while; then, in some schedules, the power is cut."""
        self.inject.is_calm = True
        world = self.world
        world.run(lambda: not any(process.is_alive for process in world.processes), limit_s=world.now_s + COMMAND_S)
        for fault in self.schedule.faults:
            if fault.kind == "power cut at the end":
                self.inject.note(fault)
                self.cut_power()
                self.wait([self.start()])
                return


def _interrupted(*_: object) -> None:
    raise Interrupted


@contextlib.contextmanager
def ended_where_they_spin(world: World) -> Iterator[None]:
    """End tasks that run on without waiting: simulated time does not pass in them, so no limit of it would."""
    events_then = -1

    def look(*_: object) -> None:
        nonlocal events_then
        if world.current is not None and world.num_events == events_then:
            world.violate(f"{world.current.name} runs on without waiting")
            raise Killed
        events_then = world.num_events

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, SPINS_S, SPINS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@torch.inference_mode()  # hosts wait within it, and one would restore what another one has: so all have it throughout
def run_schedule(schedule: Schedule, *, keeps_log: bool = False) -> Result:
    """Run a schedule and check what it came to. Use it inside `patches.simulated`."""
    if gc.get_count()[0] > GARBAGE_ALLOWED:
        collect()
    simulation = Simulation(schedule, keeps_log=keeps_log)
    world = simulation.world
    try:
        with ended_where_they_spin(world):
            simulation.run()
            checks.check_end(simulation)
    except Endless as error:
        world.violate(str(error))
    finally:
        simulation.inject.is_calm = True
        simulation.ledger.is_watching = False
        world.stop()
    return Result(
        schedule,
        list(dict.fromkeys(world.violations)),
        simulation.endings,
        simulation.inject.fired,
        world.lines,
        world.num_events,
        world.now_s,
        simulation.trace,
        checks.num_accepted(simulation.files()),
    )


def without_faults(schedule: Schedule) -> Schedule:
    """The undisturbed schedule of the same job: one driver, in one process, on a disk."""
    plain = {"seed": 0, "transport": "local", "store": "disk", "slots": 3, "replicas": 1, "has_drafts": False}
    return replace(schedule, **plain, starts_s=(0.0,), faults=())


def schedules(first: int, count: int) -> Iterator[Schedule]:
    return (draw(seed) for seed in range(first, first + count))
