"""Drivers of one small run, to be killed, and what a schedule does to them."""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, fields
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import pipeline.runtime.local  # noqa: F401  (here, so that no forked driver has to)
from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.errors import CageError
from pipeline.stages.relabel import relabel
from pipeline.stages.retry import Retry, retry
from support import failpoints
from support.failpoints import AllOf, Failpoint, KillAt, Slow, Watcher, watched
from support.ray_victims import MARKS, RayNodes, find, kill_one

FORK = multiprocessing.get_context("fork")  # a driver then starts in milliseconds instead of the imports' seconds
NUM_ROWS = 14
PATIENCE_S = 1200.0
STALL_S = 600.0  # less than the patience: a run that stands still says why before it is given up
FAILED = 1

KILLED_BY_POINT = {
    Failpoint.MID_PREFILL: "host",
    Failpoint.MID_STEP: "host",
    Failpoint.BEFORE_DATA: "coordinator",
    Failpoint.AFTER_DATA: "coordinator",
    Failpoint.AFTER_COMMIT: "coordinator",
    Failpoint.BEFORE_MANIFEST: "driver",
}


@dataclass
class Tally:
    """What schedules came to; kills by kind."""

    schedules: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    commands_failed: int = 0
    rows_lost: int = 0
    rows_repeated: int = 0
    files_differing: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kills.items()))
        counts = {each.name.replace("_", " "): getattr(self, each.name) for each in fields(self)}
        counts["kills"] = f"{self.kills.total()} ({kinds})"
        return "  ".join(f"{name} {value}" for name, value in counts.items())

    @property
    def is_clean(self) -> bool:
        return not (self.rows_lost or self.rows_repeated or self.files_differing)


def make_job(folder: Path, run: Path, *, transport: str = "local", address: str | None = None) -> Config:
    """The job of every schedule; one prompt is null, so that a shard has a failed row."""
    rows = [{"id": f"r{at}", "prompt": None if at == 4 else "tell me " * (at % 3) + "x"} for at in range(NUM_ROWS)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_config(
        {
            "input": {"path": str(prompts), "id": "id"},
            "output": {"path": str(run), "rows_per_shard": 2},
            "base": str(folder / "model"),
            "principals": {"kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7}},
            "decoding": {"max_new_tokens": 6, "agent_temperature": 0.5, "trace": "tokens"},
            "cluster": {"transport": transport, "slots": 3, "address": address, "stall_timeout_s": STALL_S},
            "errors": {"budget": 1, "max_attempts": 10},
        }
    )


def mended_job(folder: Path, run: Path) -> Config:
    """The job over the rows as they are in the end: with the mended ones."""
    rows = mended_rows(folder)
    prompts = folder / "mended/prompts.jsonl"
    prompts.parent.mkdir(exist_ok=True)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_job(folder, run)
    return config.model_copy(update={"input": config.input.model_copy(update={"path": str(prompts)})})


def mended_rows(folder: Path) -> list[dict[str, str | None]]:
    """All rows of the job; the one that fails is mended, and one that does not is another."""
    make_job(folder, folder / "unused")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return [{**row, "prompt": f"mended {row['id']}"} if row["id"] in ("r4", "r9") else row for row in rows]


def make_model(folder: Path) -> None:
    from support import tiny_models

    tiny_models.make_model(folder / "model")


def drive(config: Config | Retry, folder: Path, watch: Watcher | None = None) -> None:
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = io.StringIO()
    if isinstance(config, Config) and config.cluster.transport == "ray":
        import ray

        ray.cloudpickle.register_pickle_by_value(failpoints)  # workers cannot import the tests
    try:
        if isinstance(config, Retry):
            retry(config, folder / "cache", io.StringIO(), wiring=watched(watch))
        else:
            relabel(config, folder / "cache", io.StringIO(), wiring=watched(watch))
    except CageError as error:
        with (folder / "errors.txt").open("a") as file:
            file.write(
                f"{config if isinstance(config, Retry) else config.output.path}: {type(error).__name__}: {error}\n"
            )
        sys.exit(FAILED)
    except Exception:
        with (folder / "errors.txt").open("a") as file:
            file.write(traceback.format_exc())
        raise


def start(config: Config | Retry, folder: Path, watch: Watcher | None = None) -> BaseProcess:
    process = FORK.Process(target=drive, args=(config, folder, watch))
    process.start()
    return process


def finish(config: Config | Retry, folder: Path, *, num_drivers: int = 1) -> None:
    """Let drivers work undisturbed, side by side; each must end well."""
    drivers = [start(config, folder) for _ in range(num_drivers)]
    for driver in drivers:
        driver.join(PATIENCE_S)
    exit_codes = [driver.exitcode for driver in drivers]
    for driver in drivers:
        driver.kill()
    if any(code != 0 for code in exit_codes):
        errors = folder / "errors.txt"
        messages = errors.read_text() if errors.exists() else ""
        raise RuntimeError(f"undisturbed drivers ended with {exit_codes}; {messages}")


def ended(driver: BaseProcess) -> int:
    """Wait for a driver that nobody kills any more; 1 if it ended with an error, for which it must have a line."""
    driver.join(PATIENCE_S)
    if driver.is_alive():
        driver.kill()
        raise RuntimeError(f"a driver did not end within {PATIENCE_S:g} s")
    if driver.exitcode not in (0, FAILED, -signal.SIGKILL):
        raise RuntimeError(f"a driver ended with {driver.exitcode}")
    return int(driver.exitcode == FAILED)


def disturb_locally(config: Config | Retry, folder: Path, chance: random.Random, scratch: Path) -> Tally:
    """Start one driver or two and kill them, at a point or a random moment."""
    point = chance.choice(list(Failpoint))
    watch = KillAt(point, scratch, chance.randint(1, 6)) if chance.random() < 0.7 else None
    drivers = [start(config, folder, watch) for _ in range(chance.choice([1, 1, 2]))]
    ends_s = time.monotonic() + (PATIENCE_S if isinstance(watch, KillAt) else chance.uniform(0.05, 2.0))
    while any(driver.is_alive() for driver in drivers) and time.monotonic() < ends_s:
        time.sleep(0.005)
    kills = Counter(driver=int(isinstance(watch, KillAt) and watch.has_killed))
    for driver in drivers:
        if driver.is_alive():
            driver.kill()
            kills["driver"] += 1
        driver.join()
    return Tally(kills=kills)


@dataclass(frozen=True)
class RayDisturbance:
    """Start a driver and kill a process of it, or it, or a node; whatever lives goes on until it ends."""

    nodes: RayNodes

    def __call__(self, config: Config, folder: Path, chance: random.Random, scratch: Path) -> Tally:
        victim = chance.choice(["point", "point", "point", "host", "coordinator", "worker", "driver", "node"])
        if victim == "point":
            return self._kill_at_point(config, folder, chance, scratch)
        driver = start(config, folder, Slow(Failpoint.MID_STEP))
        below = self.nodes.pid if config.cluster.address else driver.pid or 0
        awaited = MARKS[victim if victim in ("host", "coordinator") else chance.choice(["host", "coordinator"])]
        while driver.is_alive() and not find(below, awaited):
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 6))
        killed = driver.is_alive() and self._kill(victim, driver, below, chance)
        return Tally(kills=Counter({victim: int(killed)}), commands_failed=ended(driver))

    def _kill_at_point(self, config: Config, folder: Path, chance: random.Random, scratch: Path) -> Tally:
        point = chance.choice(list(Failpoint))
        at_point = KillAt(point, scratch, 1 if point is Failpoint.BEFORE_MANIFEST else chance.randint(1, 5))
        failed = ended(start(config, folder, AllOf((at_point, Slow(Failpoint.MID_STEP)))))
        return Tally(kills=Counter({KILLED_BY_POINT[point]: int(at_point.has_killed)}), commands_failed=failed)

    def _kill(self, victim: str, driver: BaseProcess, below: int, chance: random.Random) -> bool:
        if victim == "driver":
            driver.kill()
            return True
        if victim == "node" and below == self.nodes.pid:
            self.nodes.lose_node(chance)
            return True
        return kill_one(below, MARKS[victim], chance)
