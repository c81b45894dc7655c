"""The command: run schedules by their seeds; show, shrink and replay those that fail."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from simulation.faults import KINDS
from simulation.mutants import MUTANTS, planted
from simulation.patches import simulated
from simulation.schedule import Result, Schedule, draw, run_schedule
from simulation.shrink import shrink

SHOWN = 3  # schedules that failed, of one process
DESCRIPTION = """Simulate whole runs in one process and check that faults lose, repeat and change nothing.

Every seed is a schedule: a job, drivers and faults. One that fails is shrunk to the fewest faults and printed with
the command that replays it."""


@dataclass
class Tally:
    """What schedules came to."""

    num_schedules: int = 0
    num_events: int = 0
    cpu_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    num_accepted: int = 0
    failed: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.num_schedules += 1
        self.num_events += result.num_events
        self.faults.update(fault.kind for fault in result.fired)
        self.endings.update(ending.kind or "done" for ending in result.endings)
        self.num_accepted += result.num_accepted
        if result.violations:
            self.failed.append(result)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.num_schedules + other.num_schedules,
            self.num_events + other.num_events,
            self.cpu_s + other.cpu_s,
            self.faults + other.faults,
            self.endings + other.endings,
            self.num_accepted + other.num_accepted,
            self.failed + other.failed,
        )


def run_seeds(seeds: Sequence[int], mutant: str = "") -> Tally:
    """Run the schedules of some seeds, until a few have failed."""
    tally = Tally()
    with planted(mutant) if mutant else contextlib.nullcontext(), simulated():
        started_s = time.process_time()  # what is simulated is imported by now
        for seed in seeds:
            tally.add(run_schedule(draw(seed)))
            if len(tally.failed) >= SHOWN:
                break
        tally.cpu_s = time.process_time() - started_s
    return tally


def find(mutant: str, seeds: Sequence[int]) -> Result | None:
    """The first schedule that finds a planted fault; None where none does."""
    with planted(mutant), simulated():
        results = (run_schedule(draw(seed)) for seed in seeds)
        return next((result for result in results if result.violations), None)


def main(arguments: Sequence[str] | None = None, out: TextIO = sys.stdout) -> int:
    """Run the command; 1 where a schedule failed."""
    options = _parser().parse_args(arguments)
    if options.replay:
        return _replay(Schedule.from_json(options.replay), options.mutant, out)
    total = Tally()
    for tally in _tallies(options):
        total += tally
    for result in total.failed[:SHOWN]:
        _show(result, options.mutant, out)
    rate = total.num_schedules / max(total.cpu_s, 1e-9) * 60
    print(
        f"{total.num_schedules:,} schedules, {len(total.failed)} failed; {rate:,.0f} a minute of CPU time", file=out
    )
    never = [name for name in KINDS if not total.faults[name]]
    print(f"faults that occurred: {_listed(total.faults)}", file=out)
    print(f"how commands ended: {_listed(total.endings)}", file=out)
    if never:
        print(f"faults that never occurred: {', '.join(never)}", file=out)
    return int(bool(total.failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schedules", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first one (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share them (default: 1)")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), default="", metavar="NAME", help="plant a fault")
    parser.add_argument("--replay", default="", metavar="JSON", help="run one schedule and print all that happens")
    return parser


def _tallies(options: argparse.Namespace) -> Iterator[Tally]:
    seeds = range(options.seed, options.seed + options.schedules)
    if options.jobs == 1:
        yield run_seeds(seeds, options.mutant)
        return
    shares = [(seeds[at :: options.jobs], options.mutant) for at in range(options.jobs)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        yield from pool.starmap(run_seeds, shares)


def _show(result: Result, mutant: str, out: TextIO) -> None:
    """A schedule that failed, the least of it that still fails, and how to see it again."""
    print(f"FAILED {result.schedule}", file=out)
    with planted(mutant) if mutant else contextlib.nullcontext(), simulated():
        least = shrink(result.schedule)
        again = run_schedule(least)
    print(f"shrunk to {least}", file=out)
    for violation in again.violations:
        print(f"  ! {violation}", file=out)
    option = f" --mutant '{mutant}'" if mutant else ""
    print(f"replay: python -m tests.simulation{option} --replay '{least.to_json()}'\n", file=out)


def _replay(schedule: Schedule, mutant: str, out: TextIO) -> int:
    with planted(mutant) if mutant else contextlib.nullcontext(), simulated():
        result = run_schedule(schedule, keeps_log=True)
    print(schedule, *result.lines, sep="\n", file=out)
    for violation in result.violations:
        print(f"  ! {violation}", file=out)
    return int(bool(result.violations))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
