"""The stages of the evidence. Each is a `cage` command, or a function, that leaves its result in files.

A stage that is done is skipped; one that was interrupted goes on, because the commands do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs.evidence.prompts import write_prompts
from jobs.evidence.scales import Scale
from pipeline.errors import CageError

CONFIGS = Path("configs/evidence")
HALVES = ("a", "b")
PAIRS = {"tone": ("cheerful", "formal"), "words": ("simple", "formal")}
SEED = 0


class StageFailed(CageError):
    """A command of a stage failed; what it said is on the terminal."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Something to do once.

    Args:
        name: of its mark below `_done`.
        command: words after `cage`, or a function.
        done: what would make it another stage: it runs again when this changes.
    """

    name: str
    command: tuple[str, ...] | Callable[[], None]
    done: str

    def run(self) -> None:
        """Run it to its end. Raises StageFailed."""
        if callable(self.command):
            self.command()
            return
        code = subprocess.run([sys.executable, "-m", "jobs", *self.command], check=False).returncode
        if code:
            raise StageFailed(f"stage {self.name}: cage {self.command[0]} ended with code {code}")


class Marks:
    """Which stages are done, and how long each took: one small file a stage.

    Args:
        folder: of the marks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_done(self, stage: Stage) -> bool:
        """Whether it was run to its end as it is now."""
        file = self._folder / f"{stage.name}.json"
        return file.exists() and json.loads(file.read_text(encoding="utf-8"))["done"] == stage.done

    def run(self, stage: Stage) -> None:
        """Run a stage and mark it. Raises StageFailed."""
        started = time.time()
        stage.run()
        mark = {"done": stage.done, "seconds": round(time.time() - started), "ended": time.strftime("%Y-%m-%d %H:%M")}
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{stage.name}.json").write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")

    def seconds(self) -> dict[str, int]:
        """Wall-clock seconds by stage, of the last command that ended it."""
        files = sorted(self._folder.glob("*.json"))
        return {file.stem: json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files}


def stages(scale: Scale, folder: Path) -> Iterator[Stage]:
    """All stages that need a model, in order.

    Args:
        scale: their sizes.
        folder: where everything goes.
    """
    prompts = folder / "prompts"
    sizes = {"training": scale.training, "advise": scale.advise, "held_out": scale.held_out}
    yield Stage("prompts", lambda: write_prompts(prompts, **sizes, seed=SEED), json.dumps(sizes))
    for half in HALVES:
        for objective in scale.objectives:
            pairs = (f"input.path={prompts}/train-{half}.jsonl", f"output.path={folder}/pairs-{half}")
            yield _command(f"pairs-{half}-{objective}", "synthesize", "pairs", *pairs, f"synthesis.score={objective}")
            place = f"output.path={folder}/principals-{half}/{objective}"
            words = (f"input.path={folder}/pairs-{half}", place, f"training.epochs={scale.epochs}")
            yield _command(f"train-{half}-{objective}", "train", "train", *words)
    yield _command(
        "rewards",
        "advise",
        "rewards",
        f"--games={folder}/games.npz",
        f"input.path={prompts}/advise.jsonl",
        f"output.path={folder}/rewards",
        f"advise.prompts={scale.advise}",
        *(f"principals.{each}={_trained(folder, each, 'a')}" for each in scale.objectives),
        *(f"advise.views.{each}={_trained(folder, each, 'b')}" for each in scale.objectives),
    )
    for unit in scale.units:
        for name in scale.sets:
            yield from _evaluations(scale, folder, name, unit)


def _evaluations(scale: Scale, folder: Path, name: str, unit: str) -> Iterator[Stage]:
    """One set of principals at equal KL, and at equal agent temperature."""
    kind, _, pair = name.partition("_")
    names = PAIRS[pair]
    vectors = [dict(zip(names, (weight, round(1 - weight, 2)), strict=True)) for weight in scale.weights]
    common = [
        f"input.path={folder}/prompts/held_out.jsonl",
        f"grid.weights={_flow(vectors)}",
        f"grid.rules={_flow([*scale.rules, *(['best_of_n'] if unit == 'answer' else [])])}",
        *([f"decoding.unit={unit}"] if unit != "token" else []),
    ]
    if kind == "trained":
        common += [f"principals.{each}={_trained(folder, each, 'a')}" for each in names]
    ways: dict[str, tuple[str, ...]] = {
        "kl": (f"decoding.target_kl={scale.target_kl}", "grid.agent_temperatures=[0.3]")
    }
    if scale.agent_temperatures:
        ways["temperature"] = (f"grid.agent_temperatures={_flow(list(scale.agent_temperatures))}",)
    for at, changes in ways.items():
        place = f"{name}-{unit}-{at}"
        yield _command(place, "evaluate", name, *common, *changes, f"output.path={folder}/{place}")


def _command(name: str, command: str, config: str, *words: str) -> Stage:
    words = (command, "-c", str(CONFIGS / f"{config}.yaml"), *words)
    return Stage(name, words, " ".join(words))


def _trained(folder: Path, objective: str, half: str) -> str:
    """The section of a trained principal."""
    adapter = f"{folder}/principals-{half}/{objective}/{objective}"
    return _flow({"kind": "arm", "adapter": adapter, "reference": "backbone"})


def _flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
