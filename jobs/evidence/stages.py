"""The stages of the evidence. Each is a `cage` command, or a function, that leaves its result in files.

A stage that is done is skipped; one that was interrupted goes on, because the commands do.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from jobs.evidence.machine import machine
from jobs.evidence.prompts import write_prompts
from jobs.evidence.scales import Evaluation, Scale
from jobs.evidence.scored import write_scored
from jobs.evidence.small_model import LAYERS, write_small_model
from pipeline.errors import CageError

CONFIGS = Path("configs/evidence")
BASE = "smollm2-135m"
PAIRS = {"tone": ("cheerful", "formal"), "words": ("simple", "formal")}
SCORED = ("aware", "value", "small")  # kinds of principals that are trained on scores of several objectives at once
SEED = 0
AGAIN = "-again"  # what the folder of principals from another seed ends with


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
        found = self._read(stage.name)
        return found.get("done") == stage.done and "ended" in found

    def run(self, stage: Stage) -> None:
        """Run a stage and mark it. What an interrupted run of it took is counted, too. Raises StageFailed."""
        found = self._read(stage.name)
        goes_on = found.get("done") == stage.done
        spent = {key: found[key] if goes_on else 0.0 for key in ("seconds", "core_seconds")} if found else {}
        started, started_core = time.time(), _core_seconds()
        ended = {}
        try:
            stage.run()
            ended = {"ended": time.strftime("%Y-%m-%d %H:%M")}
        finally:
            mark = {
                "done": stage.done,
                "seconds": round(spent.get("seconds", 0.0) + time.time() - started, 1),
                "core_seconds": round(spent.get("core_seconds", 0.0) + _core_seconds() - started_core, 1),
                "machine": machine(),
                **ended,
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{stage.name}.json").write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")

    def durations(self, stage: Stage) -> dict[str, Any]:
        """When a stage that is done ended and on what, its seconds by the clock, and those of processor cores."""
        return {key: value for key, value in self._read(stage.name).items() if key != "done"}

    def _read(self, name: str) -> dict[str, Any]:
        file = self._folder / f"{name}.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _core_seconds() -> float:
    """Of this process and of all that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def stages(scale: Scale, folder: Path) -> Iterator[Stage]:
    """All stages that need a model, in order.

    Args:
        scale: their sizes.
        folder: where everything goes.
    """
    prompts = folder / "prompts"
    sizes = {"training": scale.training, "advise": scale.advise, "held_out": scale.held_out}
    yield Stage("prompts", lambda: write_prompts(prompts, **sizes, seed=SEED), json.dumps(sizes))
    for half in scale.halves:
        yield from _trainings(scale, folder, half)
    if scale.has_views:
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
    if scale.again:
        yield from _trained_again(scale, folder)
    scored = [each for each in scale.evaluations if each.kind in SCORED]
    for pair in dict.fromkeys(each.pair for each in scored):
        yield _scores(scale, folder, pair)
    if any(each.kind == "small" for each in scored):
        yield Stage("small-model", lambda: write_small_model(BASE, folder / "small-model"), f"{BASE} {LAYERS}")
    for kind, pair in dict.fromkeys((each.kind, each.pair) for each in scored):
        yield _scored_training(scale, folder, kind, pair)
    for evaluation in scale.evaluations:
        yield _evaluation(scale, folder, evaluation)


def _trainings(scale: Scale, folder: Path, half: str) -> Iterator[Stage]:
    """Answers of the base, and for every objective its pairs of them and a principal; or the answers alone."""
    first = _answers(scale, folder, half)
    for objective in scale.objectives:
        run = folder / f"pairs-{half}-{objective}"
        if run != first:
            yield Stage(
                f"answers-{half}-{objective}", partial(_copy, first, run), f"{first} {scale.answers} {scale.training}"
            )
        yield _command(
            run.name,
            "synthesize",
            "pairs",
            f"input.path={folder}/prompts/train-{half}.jsonl",
            f"output.path={run}",
            f"decoding.n={scale.answers}",
            f"cluster.slots={scale.slots}",
            f"synthesis.score={objective}",
            f"synthesis.pairs.max_pairs={scale.pairs[objective]}",
        )
        if not scale.has_arms:
            return  # the scores of all objectives lie beside the answers
        place = f"{folder}/principals-{half}/{objective}"
        yield _training(scale, f"train-{half}-{objective}", run, place)


def _training(scale: Scale, name: str, run: Path, place: str, *more: str) -> Stage:
    """A principal that learns from the pairs of a run."""
    words = (f"input.path={run}", f"output.path={place}", f"training.epochs={scale.epochs}")
    return _command(name, "train", "train", *words, f"base.dtype={scale.training_dtype}", *more)


def _trained_again(scale: Scale, folder: Path) -> Iterator[Stage]:
    """Principals of the first half from another seed, and the token rewards of both trainings."""
    half = scale.halves[0]
    for objective in scale.again:
        run, place = folder / f"pairs-{half}-{objective}", f"{folder}/principals-{half}{AGAIN}/{objective}"
        yield _training(scale, f"again-{half}-{objective}", run, place, f"training.seed={SEED + 1}")
    first, again = (
        ", ".join(f"{each}: {_trained(folder, each, of)}" for each in scale.again) for of in (half, half + AGAIN)
    )
    yield _command(
        "rewards-again",
        "advise",
        "rewards",
        f"--games={folder}/games-again.npz",
        f"input.path={folder}/prompts/advise.jsonl",
        f"output.path={folder}/rewards-again",
        f"advise.prompts={scale.advise}",
        f"principals={{{first}}}",
        f"advise.views={{{again}}}",
    )


def _answers(scale: Scale, folder: Path, half: str) -> Path:
    """The run that draws the base's answers to a half; the other objectives' runs begin as copies of it."""
    return folder / f"pairs-{half}-{scale.objectives[0]}"


def _copy(run: Path, place: Path) -> None:
    """Copy a run whole or not at all."""
    shutil.rmtree(place, ignore_errors=True)
    aside = place.with_name(f"{place.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(run, aside)
    aside.rename(place)


def _scored(scale: Scale, folder: Path, pair: str) -> Path:
    return folder / f"scored-{scale.halves[0]}-{pair}.jsonl"


def _scores(scale: Scale, folder: Path, pair: str) -> Stage:
    """The first half's answers with their scores for two objectives."""
    half, file = scale.halves[0], _scored(scale, folder, pair)
    return Stage(file.stem, lambda: write_scored(_answers(scale, folder, half), PAIRS[pair], file), str(file))


def _scored_training(scale: Scale, folder: Path, kind: str, pair: str) -> Stage:
    """Principals of two objectives that learn from these scores."""
    half, names = scale.halves[0], PAIRS[pair]
    model = (f"base.model={folder}/small-model",) if kind == "small" else ()
    return _command(
        f"train-{half}-{kind}_{pair}",
        "train",
        f"train_{kind}",
        f"input.path={_scored(scale, folder, pair)}",
        f"input.scores={_flow({name: name for name in names})}",
        f"input.max_pairs={min(scale.pairs[name] for name in names)}",
        f"output.path={folder}/principals-{half}/{kind}_{pair}",
        f"training.epochs={scale.epochs}",
        f"base.dtype={scale.training_dtype}",
        *model,
    )


def _evaluation(scale: Scale, folder: Path, evaluation: Evaluation) -> Stage:
    """Answers to the held-out prompts, and what judges say of them."""
    half, names = next(iter(scale.halves), ""), PAIRS[evaluation.pair]  # prompted principals need none
    vectors = [dict(zip(names, (weight, round(1 - weight, 2)), strict=True)) for weight in evaluation.weights]
    words = [
        f"input.path={folder}/prompts/held_out.jsonl",
        f"input.limit={evaluation.prompts}",
        f"grid.weights={_flow(vectors)}",
        f"grid.rules={_flow(list(evaluation.rules))}",
        f"cluster.slots={scale.slots}",
        *([f"decoding.unit={evaluation.unit}"] if evaluation.unit != "token" else []),
        *([f"base.dtype={scale.dtype}"] if scale.dtype != "float32" else []),
    ]
    if evaluation.kind == "trained":
        words += [f"principals.{each}={_trained(folder, each, half)}" for each in names]
    if evaluation.kind in SCORED:
        place = f"{folder}/principals-{half}/{evaluation.principals}"
        adapters = {each: f"{place}/{'preference' if evaluation.kind == 'aware' else each}" for each in names}
        words += [f"principals.{each}.adapter={adapter}" for each, adapter in adapters.items()]
    if evaluation.kind == "small":
        words += [f"principals.{each}.model={folder}/small-model" for each in names]
    if evaluation.agent_temperatures:
        words.append(f"grid.agent_temperatures={_flow(list(evaluation.agent_temperatures))}")
    else:
        begin = scale.begin if evaluation.begin is None else evaluation.begin
        words += [f"decoding.target_kl={scale.target_kl}", f"grid.agent_temperatures=[{begin}]"]
    words.append(f"output.path={folder}/{evaluation.name}")
    return _command(evaluation.name, "evaluate", evaluation.principals, *words)


def _command(name: str, command: str, config: str, *words: str) -> Stage:
    words = (command, "-c", str(CONFIGS / f"{config}.yaml"), *words)
    return Stage(name, words, " ".join(words))


def _trained(folder: Path, objective: str, half: str) -> str:
    """The section of a trained principal."""
    adapter = f"{folder}/principals-{half}/{objective}/{objective}"
    return _flow({"kind": "arm", "adapter": adapter, "reference": "backbone"})


def _flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
