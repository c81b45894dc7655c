"""`cage bench startup`: how long commands take, as ratios to bare imports in the same run.

Every case and every baseline is a process of its own, with byte code that is already there. They take turns, so that
a busy minute of the machine falls on all of them; each time is a median.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pipeline.errors import CageError, ExitCode
from pipeline.hub.embedded import default_cache_folder, prepare_embedded

PRINCIPAL = {"kind": "prompted", "principle": "Answer in one short sentence.", "weight": 0.5}
# not passed on to the measured processes: without byte code they would compile every module
NO_BYTE_CODE = "PYTHONDONTWRITEBYTECODE"
TIMEOUT_S = 600
IMPORTS, LOADING = "imports", "loading"


@dataclass(frozen=True, slots=True)
class Case:
    """A process to measure.

    Attributes:
        name: what a user does.
        arguments: of the interpreter.
        exit_code: the only one with which a time counts.
        baseline: the name of the case to whose time it is compared; None for a baseline.
        limit: the ratio that it must not exceed; None for a baseline.
        removed: a folder that is removed before each run, as the case makes it.
    """

    name: str
    arguments: tuple[str, ...]
    exit_code: int = ExitCode.DONE
    baseline: str | None = None
    limit: float | None = None
    removed: Path | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """The median time of a case, and its ratio to the baseline's median."""

    name: str
    seconds: float
    baseline: str | None
    ratio: float | None
    limit: float | None


def run_bench_startup(*, repeats: int, json_file: Path | None) -> None:
    """Measure every case, print a table, and write the measurements to `json_file`."""
    model = prepare_embedded(default_cache_folder(os.environ), progress=print)
    with tempfile.TemporaryDirectory(prefix="cage-startup-") as folder:
        timings = measure(make_cases(Path(folder), model), repeats=repeats)
    print_timings(timings, repeats)
    if json_file is not None:
        measured = {"repeats": repeats, "cases": [asdict(timing) for timing in timings]}
        json_file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def make_cases(folder: Path, model: Path) -> list[Case]:
    """The baselines and the commands, on prompts and a finished run in `folder`.

    Args:
        folder: an empty folder.
        model: the folder of a model.
    """
    prompts, config, done = folder / "prompts.jsonl", folder / "job.yaml", folder / "done"
    prompts.write_text('{"id": "a", "prompt": "What is the capital of France?"}\n', encoding="utf-8")
    tree = {
        "input": {"path": str(prompts), "id": "id", "limit": 1},
        "output": {"path": str(done)},
        "base": {"model": str(model)},
        "principals": {"brief": PRINCIPAL},
        "decoding": {"max_new_tokens": 1},
        "cluster": {"transport": "local", "slots": 1},
    }
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    relabel = ("relabel", "-c", str(config))
    run_case(_command("a finished run", *relabel))  # which status, inspect and a second run look at

    def refused(name: str, *arguments: str) -> Case:
        return _command(name, *arguments, exit_code=ExitCode.CONFIGURATION, limit=2.0)

    return [
        Case(IMPORTS, ("-c", "import pydantic, yaml, typer, rich, pyarrow.parquet")),
        refused("a wrong key", *relabel, "decodng.seed=1"),
        refused("no configuration file", "relabel", "-c", str(folder / "none.yaml")),
        refused("no input file", *relabel, f"input.path={folder / 'none.jsonl'}"),
        refused("no such column", *relabel, "input.id=none"),
        refused("an output that cannot be written", *relabel, f"output.path={prompts / 'run'}"),
        refused("no model folder", *relabel, f"base.model={folder / 'none'}"),
        _command("a run that is complete", *relabel, limit=2.0),
        _command("plan", "plan", "-c", str(config), limit=4.0),
        _command("status", "status", str(done), limit=4.0),
        _command("inspect", "inspect", str(done), "a", limit=4.0),
        Case(
            LOADING,
            (
                "-c",
                "import sys, torch, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])",
                str(model),
            ),
        ),
        _command(
            "a local run of one token",
            *(*relabel, f"output.path={folder / 'run'}"),
            baseline=LOADING,
            limit=1.3,
            removed=folder / "run",
        ),
    ]


def measure(cases: Sequence[Case], *, repeats: int) -> list[Timing]:
    """Run every case once to warm up, then all of them `repeats` times in turn.

    Raises:
        CageError: a case did not end with its exit code.
    """
    for case in cases:
        run_case(case)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            seconds[case.name].append(run_case(case))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        Timing(
            name=case.name,
            seconds=medians[case.name],
            baseline=case.baseline,
            ratio=None if case.baseline is None else medians[case.name] / medians[case.baseline],
            limit=case.limit,
        )
        for case in cases
    ]


def print_timings(timings: Sequence[Timing], repeats: int) -> None:
    """Print a table for a person."""
    table = Table(title=f"Start-up, medians of {repeats} runs", title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    for heading in ("seconds", "x baseline", "at most", "baseline"):
        table.add_column(heading, justify="right")
    for each in timings:
        table.add_row(each.name, f"{each.seconds:.3f}", _number(each.ratio), _number(each.limit), each.baseline or "")
    console = Console()
    console.width = max(console.width, 90)  # a table that wraps its numbers cannot be read
    console.print(table)
    console.print(f"{IMPORTS}: of pydantic, yaml, typer, rich and pyarrow.parquet")
    console.print(f"{LOADING}: of torch, transformers and the model")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _command(name: str, *arguments: str, **case: Any) -> Case:
    return Case(name, ("-m", "jobs", *arguments), **{"baseline": IMPORTS, **case})


def run_case(case: Case) -> float:
    """Seconds that the process takes. Raises CageError if its exit code is not the expected one."""
    if case.removed is not None:
        shutil.rmtree(case.removed, ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *case.arguments],
        env=_environment(os.environ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode != case.exit_code:
        raise CageError(f"{case.name}: exit code {done.returncode} instead of {case.exit_code}: {done.stderr[-500:]}")
    return seconds


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name != NO_BYTE_CODE}
