"""One of the processes that train together, which a test starts by its name."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

from pipeline.config.files import parse_as
from pipeline.errors import CageError
from pipeline.training.comparisons import Answer, Comparison, Drops
from pipeline.training.processes import Processes
from pipeline.training.returns import score_comparisons
from pipeline.training.settings import TrainConfig


def comparisons() -> list[Comparison]:
    texts = [("a", "bb"), ("ccc", "dd"), ("e", "none"), ("f", "g")]
    return [
        Comparison(
            f"row {at}", "pairs.jsonl", [{"role": "user", "content": f"q{at}"}], (Answer(one), Answer(two)), {}
        )
        for at, (one, two) in enumerate(texts)
    ]


def judged(code: Path, folder: Path, processes: Processes) -> list[object]:
    tree = {
        "input": {"path": "x"}, "output": {"path": "y"}, "base": "m",
        "training": {"loss": "value", "judge": {"kind": "function", "function": f"{code}:long"}},
    }  # fmt: skip
    drops = Drops()
    judge = parse_as(TrainConfig, tree).training.judge
    found = score_comparisons(comparisons(), judge, "long", folder, drops, processes)
    scores = [[each.place, each.labels, [answer.scores for answer in each.answers]] for each in found]
    return [scores, drops.describe()]


def one_of_two(rank: int, port: int, code: Path, folder: Path) -> None:
    """What process `rank` finds, in a file; then both form a process group, as the trainer does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        said: object = judged(code, folder, Processes(rank, 2))
    except CageError as error:
        said = str(error)
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps([said, total.item()]))
