"""Kill runs at random, resume them, and compare their files with those of a run that nobody disturbed.

    python tests/chaos.py --schedules 20 --seed 0

A schedule kills the drivers of one run directory several times, at a named point (pipeline/points.py) or at a random
moment, sometimes two drivers at once, then lets one finish, or two side by side. Over Ray a point may be a host's.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow.parquet as pq
import torch
from faults import KillAt

from pipeline.config import Config
from pipeline.config_files import parse_config
from pipeline.points import Point, unwatched
from pipeline.relabel import relabel

FORK = multiprocessing.get_context("fork")  # a driver then starts in milliseconds instead of the imports' seconds
NUM_ROWS = 14
PATIENCE_S = 300.0


@dataclass
class Tally:
    """What the schedules came to."""

    schedules: int = 0
    kills: int = 0
    rows_lost: int = 0
    rows_repeated: int = 0
    files_differing: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __str__(self) -> str:
        return "  ".join(f"{each.name.replace('_', ' ')} {getattr(self, each.name)}" for each in fields(self))

    @property
    def is_clean(self) -> bool:
        return not (self.rows_lost or self.rows_repeated or self.files_differing)


def make_job(folder: Path, run: Path, transport: str) -> Config:
    """The job of every schedule; one prompt is null, so that a shard has a rejected row."""
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
            "cluster": {"transport": transport, "slots": 3},
            "errors": {"budget": 1},
        }
    )


def make_model(folder: Path) -> None:
    import tiny_models

    tiny_models.make_model(folder / "model")


def drive(config: Config, folder: Path, watch=unwatched) -> None:
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = io.StringIO()
    relabel(config, folder / "cache", io.StringIO(), watch=watch)


def start(*arguments):
    process = FORK.Process(target=drive, args=arguments)
    process.start()
    return process


def finish(config: Config, folder: Path, *, num_drivers: int = 1) -> None:
    """Let drivers work undisturbed, side by side; each must end well."""
    drivers = [start(config, folder) for _ in range(num_drivers)]
    for driver in drivers:
        driver.join(PATIENCE_S)
    exit_codes = [driver.exitcode for driver in drivers]
    for driver in drivers:
        driver.kill()
    if any(code != 0 for code in exit_codes):
        raise RuntimeError(f"undisturbed drivers ended with {exit_codes}")


def points_of(transport: str) -> list[Point]:
    """In one process every point is the driver's; over Ray the last is, and others are replaced while it waits."""
    return list(Point) if transport == "local" else [Point.MID_PREFILL, Point.MID_STEP, Point.BEFORE_MANIFEST]


def disturb(config: Config, folder: Path, chance: random.Random, scratch: Path) -> int:
    """Start one driver or two and kill them; how many processes were killed."""
    scratch.mkdir()
    point = chance.choice(points_of(config.cluster.transport))
    watch = KillAt(point, scratch, chance.randint(1, 6)) if chance.random() < 0.7 else unwatched
    drivers = [start(config, folder, watch) for _ in range(chance.choice([1, 1, 2]))]
    ends_s = time.monotonic() + (PATIENCE_S if isinstance(watch, KillAt) else chance.uniform(0.05, 2.0))
    while any(driver.is_alive() for driver in drivers) and time.monotonic() < ends_s:
        time.sleep(0.005)
    kills = int(isinstance(watch, KillAt) and watch.has_killed)
    for driver in drivers:
        if driver.is_alive():
            driver.kill()
            kills += 1
        driver.join()
    return kills


def compare(expected: Path, found: Path) -> Tally:
    """Rows and files of two finished runs."""
    patterns = ("part-*.parquet", "_rejected/*.parquet")
    files = [
        {file.relative_to(run): file.read_bytes() for pattern in patterns for file in run.glob(pattern)}
        for run in (expected, found)
    ]
    differing = sum(files[0].get(name) != files[1].get(name) for name in files[0].keys() | files[1].keys())
    rows = Counter(
        row_id
        for file in files[1]
        for row_id in pq.read_table(found / file, columns=["row_id"])["row_id"].to_pylist()
    )
    lost = NUM_ROWS - len(rows)
    return Tally(rows_lost=lost, rows_repeated=rows.total() - len(rows), files_differing=differing)


def run_schedule(folder: Path, seed: int, transport: str) -> Tally:
    chance = random.Random(seed)
    run = folder / f"run-{seed}"
    config = make_job(folder, run, transport)
    kills = sum(disturb(config, folder, chance, folder / f"kills-{seed}-{at}") for at in range(chance.randint(1, 4)))
    finish(config, folder, num_drivers=chance.choice([1, 2]))
    return Tally(schedules=1, kills=kills) + compare(folder / "whole", run)


def run_schedules(folder: Path, num_schedules: int, seed: int, *, transport: str = "local", out=None) -> Tally:
    """The sum over the schedules; a line for each to `out`."""
    model = FORK.Process(target=make_model, args=(folder,))
    model.start()
    model.join()
    finish(make_job(folder, folder / "whole", "local"), folder)
    total = Tally()
    for at in range(num_schedules):
        tally = run_schedule(folder, seed + at, transport)
        total += tally
        if out is not None:
            print(f"seed {seed + at:<6} {tally}", file=out, flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", choices=["local", "ray"], default="local")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        total = run_schedules(
            Path(folder), options.schedules, options.seed, transport=options.transport, out=sys.stdout
        )
    print(f"total       {total}")
    return 0 if total.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
