"""Kill runs at random, resume them, and compare their files with those of a run that nobody disturbed.

    python tests/chaos.py --schedules 20 --seed 0
    python tests/chaos.py --schedules 20 --transport ray
    python tests/chaos.py --schedules 20 --growing

A schedule disturbs the commands of one run directory several times, at a named point (support/failpoints.py) or at a
random moment, then lets one finish, or two side by side. In one process (transport local) it kills one driver or two;
over Ray a host's process, the coordinator's, any worker's, the driver's, or a node, by turns on a cluster of several
nodes and on one that the driver starts itself.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow.parquet as pq
import torch
from support.chaos_drivers import (
    FORK,
    NUM_ROWS,
    RayDisturbance,
    Tally,
    disturb_locally,
    finish,
    make_job,
    make_model,
    mended_job,
)
from support.ray_victims import ray_nodes

from pipeline.config.sections import Config
from pipeline.stages.retry import Retry

Disturbance = Callable[[Config, Path, random.Random, Path], Tally]


def compare(expected: Path, found: Path) -> Tally:
    """Rows and files of two finished runs."""
    patterns = ("part-*.parquet", "_failed/*.parquet")
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


def run_schedule(folder: Path, seed: int, transport: str, addresses: list[str | None], disturb: Disturbance) -> Tally:
    chance = random.Random(seed)
    run = folder / f"run-{seed}"
    config = make_job(folder, run, transport=transport, address=chance.choice(addresses))
    total = Tally(schedules=1)
    for at in range(chance.randint(1, 4)):
        (scratch := folder / f"kills-{seed}-{at}").mkdir()
        total += disturb(config, folder, chance, scratch)
    finish(config, folder, num_drivers=chance.choice([1, 2]))
    return total + compare(folder / "whole", run)


def run_growing_schedule(folder: Path, seed: int) -> Tally:
    """A trial that becomes the whole, then rows that are mended; every command is killed, and some side by side."""
    chance = random.Random(seed)
    run, total = folder / f"growing-{seed}", Tally(schedules=1)
    whole = make_job(folder, run)
    trial = whole.model_copy(update={"input": whole.input.model_copy(update={"limit": chance.randint(1, NUM_ROWS)})})
    again = Retry(str(run), mended=str(folder / "mended/prompts.jsonl"))
    for step, command in enumerate((trial, whole, again)):
        for at in range(chance.randint(1, 2)):
            (scratch := folder / f"growing-kills-{seed}-{step}-{at}").mkdir()
            total += disturb_locally(command, folder, chance, scratch)
        if command is not trial or chance.random() < 0.5:  # a run may be extended before it is done
            finish(command, folder, num_drivers=chance.choice([1, 2]))
    return total + compare_rows(folder / "mended/run", run)


def compare_rows(expected: Path, found: Path) -> Tally:
    """The rows of two finished runs, whose files may be cut in other places."""
    rows = [
        [row for file in sorted(run.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]
        for run in (expected, found)
    ]
    wanted, there = ({row["row_id"]: row for row in each} for each in rows)
    differing = sum(wanted.get(row_id) != there.get(row_id) for row_id in wanted.keys() | there.keys())
    lost = len(wanted.keys() - there.keys())
    unfinished = int(not (found / "_SUCCESS").exists())
    return Tally(rows_lost=lost, rows_repeated=len(rows[1]) - len(there), files_differing=differing + unfinished)


@contextmanager
def disturbances(transport: str) -> Iterator[tuple[list[str | None], Disturbance]]:
    """Ray addresses to run at (None: the driver starts a cluster) and what to do to the drivers there."""
    if transport == "local":
        yield [None], disturb_locally
        return
    with ray_nodes() as nodes:
        yield [nodes.address, nodes.address, None], RayDisturbance(nodes)


def run_schedules(
    folder: Path, num_schedules: int, seed: int, *, transport: str = "local", out: TextIO | None = None
) -> Tally:
    """The sum over the schedules; a line for each to `out`."""
    model = FORK.Process(target=make_model, args=(folder,))
    model.start()
    model.join()
    finish(make_job(folder, folder / "whole"), folder)
    total = Tally()
    with disturbances(transport) as (addresses, disturb):
        for at in range(num_schedules):
            tally = run_schedule(folder, seed + at, transport, addresses, disturb)
            total += tally
            if out is not None:
                print(f"seed {seed + at:<6} {tally}", file=out, flush=True)
    return total


def run_growing_schedules(folder: Path, num_schedules: int, seed: int, *, out: TextIO | None = None) -> Tally:
    """The sum over schedules of runs that are extended and mended; a line for each to `out`."""
    model = FORK.Process(target=make_model, args=(folder,))
    model.start()
    model.join()
    finish(mended_job(folder, folder / "mended/run"), folder)
    total = Tally()
    for at in range(num_schedules):
        total += (tally := run_growing_schedule(folder, seed + at))
        if out is not None:
            print(f"seed {seed + at:<6} {tally}", file=out, flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", choices=["local", "ray"], default="local")
    parser.add_argument("--growing", action="store_true", help="runs that are extended and mended, in one process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if options.growing:
                total = run_growing_schedules(folder, options.schedules, options.seed, out=sys.stdout)
            else:
                total = run_schedules(
                    folder, options.schedules, options.seed, transport=options.transport, out=sys.stdout
                )
        finally:
            with contextlib.suppress(FileNotFoundError):  # what commands printed when they failed
                print((folder / "errors.txt").read_text(), end="", file=sys.stderr)
    print(f"total       {total}")
    return 0 if total.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
