"""Kill runs at random, resume them, and compare their files with those of a run that nobody disturbed.

    python tests/chaos.py --schedules 20 --seed 0
    python tests/chaos.py --schedules 20 --transport ray

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
)
from support.ray_victims import ray_nodes

from pipeline.config.sections import Config

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transport", choices=["local", "ray"], default="local")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
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
