"""A run of hours in miniature: many rows over Ray, two drivers, a kill a minute, and the memory of every process.

    python tests/soak.py                                       # 200,000 rows in an hour
    python tests/soak.py --rows 4000 --minutes 1 --kill-every 15

Hosts answer from a table, as fast as the time that is given needs. Every kill takes a host, a coordinator, a driver
or a machine; a driver that ends before the run is done is started again. The files must be those of an undisturbed
run in one process. The report says what every kind of process took in memory, at first and at last.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from support import table_hosts, tiny_models
from support.ray_victims import MARKS, RayNodes, kill_one, ray_nodes
from support.table_hosts import LONGEST, WrapTable

from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.errors import CageError
from pipeline.runtime.wiring import Wiring
from pipeline.stages.relabel import relabel

SPAWN = multiprocessing.get_context("spawn")
NUM_DRIVERS, REPLICAS, SLOTS, ROWS_PER_SHARD = 2, 2, 64, 250
SAMPLE_S, LOOK_S = 5.0, 0.5
LATE = 3  # a run may take so many times the time that it was given, and no longer
KINDS = {
    "ray::HostActor": "host",
    "ray::MapWorker": "coordinator",
    "ray::ProgressBoard": "board",
    "ray::": "Ray worker",
    "raylet": "raylet",
    "gcs_server": "gcs server",
}


def make_job(folder: Path, run: str, *, address: str | None) -> Config:
    """The job; without an address it runs in one process."""
    cluster = {"transport": "local"} if address is None else {"transport": "ray", "address": address}
    return parse_config(
        {
            "input": {"path": str(folder / "prompts.jsonl"), "id": "id"},
            "output": {"path": str(folder / run), "rows_per_shard": ROWS_PER_SHARD},
            "base": str(folder / "model"),
            "principals": {"kind": {"kind": "prompted", "principle": "be kind", "weight": 0.5}},
            "decoding": {"max_new_tokens": LONGEST + 2, "trace": "summary"},
            "cluster": {**cluster, "slots": SLOTS, "replicas": REPLICAS, "coordinator_cpus": 0.25},
            "errors": {"max_attempts": 100, "max_host_failures": 1000},
        }
    )


def drive(folder: Path, run: str, address: str | None, pause_s: float) -> None:
    """Bring the run to its end; what ends it before is written to a file."""
    import torch

    torch.set_num_threads(1)
    if address is not None:
        import ray

        ray.cloudpickle.register_pickle_by_value(table_hosts)  # workers cannot import the tests
    try:
        relabel(
            make_job(folder, run, address=address), folder, io.StringIO(), wiring=Wiring(wrap_host=WrapTable(pause_s))
        )
    except CageError as error:
        with (folder / "errors.txt").open("a") as file:
            file.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)


@dataclass
class Memory:
    """The memory of every process over time.

    Args:
        began_s: when the run began.
        samples: by kind and process id, moments in seconds since then, and bytes that are the process's own.
    """

    began_s: float = field(default_factory=time.monotonic)
    samples: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=dict)

    def take(self, roots: list[int]) -> None:
        """Look at all processes below these, and at them."""
        moment_s = time.monotonic() - self.began_s
        for process in [each for root in roots for each in _family(root)]:
            try:
                title = " ".join(process.cmdline()[:1]) or process.name()
                found = next((kind for mark, kind in KINDS.items() if mark in title or mark in process.name()), None)
                kind = found or ("driver" if process.pid in roots else "other")
                used = process.memory_info()
                self.samples.setdefault((kind, process.pid), []).append((moment_s, used.rss - used.shared))
            except psutil.Error:
                continue

    def by_kind(self) -> dict[str, dict[str, float]]:
        """By kind: processes, the most memory of one in the first and in the last quarter of the time, and how fast
        the oldest process grew over its second half, in MB."""
        last_s = max((taken[-1][0] for taken in self.samples.values()), default=0.0)
        found: dict[str, dict[str, float]] = {}
        for kind in dict.fromkeys(kind for kind, _ in self.samples):
            lives = [taken for (each, _), taken in self.samples.items() if each == kind]
            every = [sample for taken in lives for sample in taken]
            oldest = max(lives, key=lambda taken: taken[-1][0] - taken[0][0])
            half = oldest[len(oldest) // 2 :]
            hours = (half[-1][0] - half[0][0]) / 3600
            found[kind] = {
                "processes": len(lives),
                "first_mb": max((used for at_s, used in every if at_s <= last_s / 4), default=0) / 1e6,
                "last_mb": max((used for at_s, used in every if at_s >= last_s * 3 / 4), default=0) / 1e6,
                "oldest_minutes": (oldest[-1][0] - oldest[0][0]) / 60,
                "oldest_growth_mb": (half[-1][1] - half[0][1]) / 1e6,
                "oldest_growth_mb_per_hour": (half[-1][1] - half[0][1]) / 1e6 / hours if hours else 0.0,
            }
        return found


def _family(root: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def disturb(nodes: RayNodes, drivers: list[BaseProcess], chance: random.Random) -> str | None:
    """Kill something; what it was, or None where there was no such process."""
    victim = chance.choice(["host", "host", "coordinator", "driver", "node"])
    if victim == "driver":
        chance.choice(drivers).kill()
        return victim
    if victim == "node":
        nodes.lose_node(chance)
        return victim
    return victim if kill_one(nodes.pid, MARKS[victim], chance) else None


def soak(folder: Path, *, num_rows: int, minutes: float, kill_every_s: float, seed: int) -> dict[str, object]:
    """Run, kill, sample and compare; the report."""
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": f"r{at}", "prompt": f"row {at}"}) + "\n" for at in range(num_rows))
    tiny_models.make_model(folder / "model")
    steps = num_rows * (LONGEST / 2 + 1.5) / (REPLICAS * SLOTS)
    pause_s = minutes * 60 / steps
    chance, kills, memory = random.Random(seed), Counter[str](), Memory()
    restarts = 0
    with ray_nodes() as nodes:
        began_s = next_kill_s = next_sample_s = time.monotonic()
        next_kill_s += kill_every_s

        def start() -> BaseProcess:
            driver = SPAWN.Process(target=drive, args=(folder, "run", nodes.address, pause_s))
            driver.start()
            return driver

        drivers = [start() for _ in range(NUM_DRIVERS)]
        while not (folder / "run/_SUCCESS").exists():
            time.sleep(LOOK_S)
            now_s = time.monotonic()
            if now_s - began_s > LATE * 60 * minutes + 1200:
                raise RuntimeError(f"not done after {now_s - began_s:.0f} s; {_errors(folder)}")
            if now_s >= next_sample_s:
                memory.take([nodes.pid, *(driver.pid or 0 for driver in drivers)])
                next_sample_s = now_s + SAMPLE_S
            if now_s >= next_kill_s:
                if (victim := disturb(nodes, drivers, chance)) is not None:
                    kills[victim] += 1
                next_kill_s = now_s + kill_every_s
            for at, driver in enumerate(drivers):
                if not driver.is_alive() and not (folder / "run/_SUCCESS").exists():
                    drivers[at], restarts = start(), restarts + 1
        seconds = time.monotonic() - began_s
        for driver in drivers:
            driver.join(120)
            driver.kill()
    drive(folder, "whole", None, 0.0)
    whole, found = (
        {path.name: path.read_bytes() for path in (folder / name).glob("part-*")} for name in ("whole", "run")
    )
    return {
        "rows": num_rows,
        "seconds": round(seconds, 1),
        "kills": dict(kills),
        "drivers_restarted": restarts,
        "files": len(whole),
        "files_differing": sum(whole.get(name) != found.get(name) for name in whole.keys() | found.keys()),
        "memory": memory.by_kind(),
    }


def _errors(folder: Path) -> str:
    file = folder / "errors.txt"
    return file.read_text()[-2000:] if file.exists() else "no driver said why"


def describe(report: dict[str, object]) -> str:
    """The report as a table."""
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in report.items() if name != "memory"]
    head = ("process", "number", "first MB", "last MB", "oldest min", "growth MB", "MB/hour")
    rows = [
        (kind, *(f"{value:,.0f}" if key == "processes" else f"{value:,.1f}" for key, value in facts.items()))
        for kind, facts in sorted(report["memory"].items())  # type: ignore[attr-defined]
    ]
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(lines)


def main() -> int:
    """Soak, print the report, and end with 1 where a file differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report to this file as well")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        report = soak(
            Path(folder), num_rows=asked.rows, minutes=asked.minutes, kill_every_s=asked.kill_every, seed=asked.seed
        )
    if asked.json is not None:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")
    print(describe(report), flush=True)
    return int(report["files_differing"] != 0)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main())
