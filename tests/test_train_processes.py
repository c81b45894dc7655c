"""What several processes of a training do once: two processes on this machine, as `accelerate launch` starts them."""

from __future__ import annotations

import json
import multiprocessing
import socket
from pathlib import Path

from support.training_processes import judged, one_of_two

from pipeline.training.processes import ALONE

JUDGE = """
import os

def long(answers):
    with open({asked!r}, "a") as file:
        file.write(f"{{os.environ['RANK']}}\\n")
    {then}
"""
SCORES = "return [len(each.text) / 3 if each.text != 'none' else float('nan') for each in answers]"


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def run_two(folder: Path, then: str) -> tuple[list[object], list[str], Path]:
    """What both found, and the ranks in which the judge was asked."""
    code, asked = folder / "judges.py", folder / "asked"
    code.write_text(JUDGE.format(asked=str(asked), then=then), encoding="utf-8")
    port, context = free_port(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.training_processes", "torch.distributed"])  # imported once for all four
    workers = [context.Process(target=one_of_two, args=(rank, port, code, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        if worker.is_alive():
            worker.kill()
        assert worker.exitcode == 0
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [total for _, total in found] == [3.0, 3.0]  # the process group is as without it
    return [said for said, _ in found], asked.read_text().split(), code


def test_the_main_process_alone_asks_the_judge_and_the_others_have_its_scores(tmp_path, monkeypatch):
    (main, other), asked, code = run_two(tmp_path, SCORES)
    assert asked == ["0"]
    monkeypatch.setenv("RANK", "alone")
    assert main == other == json.loads(json.dumps(judged(code, tmp_path, ALONE)))
    [pairs, left_out] = main
    assert [place for place, *_ in pairs] == ["row 0", "row 1"]
    assert len(left_out) == 2


def test_a_judge_that_fails_ends_every_process_with_its_reason(tmp_path):
    (main, other), asked, _ = run_two(tmp_path, "raise RuntimeError('it is tired')")
    assert set(asked) == {"0"}
    assert "it is tired" in main
    assert other == f"the main process has no scores of training.judge: {main}"
