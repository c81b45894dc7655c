"""What the stages found, as one small file of numbers and a few charts."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.evidence import questions
from jobs.evidence.machine import machine
from jobs.evidence.scales import Scale
from jobs.evidence.stages import AGAIN, PAIRS, SEED, Marks, stages
from pipeline.advice.recording import RecordedGames
from pipeline.evaluation.metrics import spearman

Json = dict[str, Any]
TARGETS = (0.1, 0.5)
FAR = 0.5  # nats a token at which what-if questions are asked
PROMPTED = ("cheerful", "formal", "simple")
KINDS = {"trained": "", "prompted": "_prompted"}  # what the names of their principals end with
NUMBERS = ("kl_per_token", "num_tokens", "weighted", "worst_principal")
DIFFERENCES = ("mip", "hypervolume", "worst_principal", "equal_kl", "equal_length")


def pairs_of_principals(scale: Scale) -> dict[str, tuple[str, str]]:
    """By set of principals, the names of its two in the recorded games; without those that were not trained."""
    return {
        f"{kind}_{pair}": (one + ending, other + ending)
        for kind, ending in KINDS.items()
        for pair, (one, other) in PAIRS.items()
        if kind != "trained" or {one, other} <= set(scale.objectives)
    }


def groups_of_principals(scale: Scale) -> list[list[str]]:
    """Three, four and eight principals; eight are all there are, and then other views of the same objectives."""
    trained, prompted = list(scale.objectives), [f"{name}_prompted" for name in PROMPTED]
    three = [prompted, *([trained] if len(trained) == 3 else [])]
    return [*three, [*trained[:2], *prompted[:2]], questions.first([*trained, *prompted], 8)]


def ask(scale: Scale, games: RecordedGames, kept: Path) -> Json:
    """Every what-if question, on at most `scale.games` of the recorded games.

    Args:
        scale: how many games, and which principals there are.
        games: recorded.
        kept: where each answer is kept, so that an interrupted command goes on.
    """
    torch.set_num_threads(1)
    found: dict[str, list[Json]] = {}
    for question, name, answer in parts(scale, games):
        file = kept / f"{question}-{name}.json"
        if not file.exists():
            rows = list(answer())
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(".aside")
            aside.write_text(json.dumps(rows, allow_nan=False) + "\n", encoding="utf-8")
            aside.replace(file)
        found.setdefault(question, []).extend(json.loads(file.read_text(encoding="utf-8")))
    return found


def parts(scale: Scale, games: RecordedGames) -> Iterator[tuple[str, str, Callable[[], Iterator[Json]]]]:
    """The question, what it is asked about, and what answers it, for every question."""
    games = questions.with_views_as_large(games)
    some = questions.sample(games, scale.games)
    more = questions.sample(games, 2 * scale.games)
    yield "rewards", "all", partial(questions.rewards, games)
    for name, pair in pairs_of_principals(scale).items():
        yield "equal_kl", name, partial(questions.equal_kl, more, [pair], TARGETS)
        yield "scaled", name, partial(questions.scaled, some, [pair], FAR)
        yield "noisy", name, partial(questions.noisy, some, [pair], FAR)
        yield "lying", name, partial(questions.lying, some, [pair], FAR)
    for number, group in enumerate(groups_of_principals(scale)):
        yield "many", f"{number}", partial(questions.many, some, [group], FAR)
        yield "equilibria", f"{number}", partial(questions.equilibria, some, [group], (0.1, 0.3), scale.starts)


def trainings(scale: Scale, folder: Path) -> Iterator[Json]:
    """How many held-out pairs every trained principal orders right, by objective."""
    for half in (*scale.halves, *([scale.halves[0] + AGAIN] if scale.again else [])):
        for file in sorted((folder / f"principals-{half}").glob("*/*/training.json")):
            facts = json.loads(file.read_text(encoding="utf-8"))
            for objective, held_out in facts["held_out"].items():
                yield {
                    "half": half,
                    "principal": file.parent.parent.name,
                    "objective": objective,
                    **{key: facts[key] for key in ("loss", "pairs", "steps")},
                    "held_out": held_out,
                }


def evaluations(scale: Scale, folder: Path) -> Iterator[Json]:
    """Every finished evaluation: its points, and the differences of rules with their intervals."""
    for evaluation in scale.evaluations:
        file = folder / evaluation.name / "_metrics.json"
        if file.exists():
            metrics = json.loads(file.read_text(encoding="utf-8"))
            yield {
                "set": evaluation.principals,
                "unit": evaluation.unit,
                "at": evaluation.at,
                "prompts": metrics["num_prompts"],
                "answers": metrics["num_answers"],
                **{key: metrics[key] for key in ("reference_point", "normalised_from")},
                "rules": metrics["rules"],
                "points": [
                    {
                        **{key: point[key] for key in ("rule", "agent_temperature", "weights", "objectives")},
                        **{key: point[key] for key in (*NUMBERS, "scores", "intervals")},
                    }
                    for point in metrics["points"]
                ],
                "differences": [each for each in metrics["differences"] if each["metric"] in DIFFERENCES],
                "equal_kl": metrics["equal_kl"],
                "control": metrics["control"],
            }


def ask_again(scale: Scale, games: RecordedGames) -> Json:
    """How noisy the rewards of principals that were trained twice are, and what rules gain by the second training."""
    games = questions.with_views_as_large(games)
    more = questions.sample(games, 2 * scale.games)
    pairs = [pair for pair in PAIRS.values() if set(pair) <= set(scale.again)]
    return {
        "rewards_again": list(questions.rewards(games)),
        "equal_kl_again": list(questions.equal_kl(more, pairs, TARGETS)),
    }


def published(scale: Scale, place: Path) -> Iterator[Json]:
    """The evaluations of other scales that have the same principals, from their files in `place`."""
    for name in scale.others:
        yield from json.loads((place / f"{name}.json").read_text(encoding="utf-8"))["evaluations"]


def prediction(scale: Scale, asked: Json, judged: Sequence[Json]) -> Iterator[Json]:
    """Whether gains on recorded rewards say which rule judges prefer on held-out prompts, at equal KL.

    `soft_threshold` was judged at k = 1, so the other k are left out.

    Args:
        scale: which principals there are.
        asked: answers of `ask`; without gains at equal KL there is nothing to check.
        judged: evaluations of these principals, of this scale or of another one.
    """
    for evaluation in judged:
        pair = pairs_of_principals(scale).get(evaluation["set"])
        if evaluation["unit"] != "token" or pair is None or "equal_kl" not in asked:
            continue
        one, other = pair
        name = PAIRS[evaluation["set"].partition("_")[2]][0]
        scores = (_at_target if evaluation["at"] == "kl" else _on_curves)(evaluation, name)
        for weight in sorted({each["weight"] for each in asked["equal_kl"]}):
            expected = {
                each["rule"].removesuffix(" 1"): each["share"]
                for each in asked["equal_kl"]
                if each["pair"] == [one, other] and each["weight"] == weight and each["target_kl"] == FAR
            }
            found = {rule: score for (rule, place), score in scores.items() if place == weight and rule in expected}
            if len(found) < 2:
                continue
            rules = list(found)
            yield {
                "set": evaluation["set"],
                "at": evaluation["at"],
                "weight": weight,
                "rank_correlation": spearman(
                    *(torch.tensor([side[rule] for rule in rules]).double().numpy() for side in (expected, found))
                ),
                "expected": {rule: expected[rule] for rule in rules},
                "judged": found,
            }


def _at_target(evaluation: Json, name: str) -> dict[tuple[str, float], float]:
    """Weighted scores by rule and weight of the named principal, of rows that had a target of KL."""
    return {
        (point["rule"], round(point["weights"][name], 6)): point["weighted"]
        for point in evaluation["points"]
        if name in point["weights"]
    }


def _on_curves(evaluation: Json, name: str) -> dict[tuple[str, float], float]:
    """The same on curves over KL, where they are `FAR` from the base, or at their ends if all end before."""
    curves: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for level in evaluation["equal_kl"]:
        curve = curves.setdefault((level["rule"], round(level["weights"][name], 6)), [])
        curve.append((level["kl_per_token"], level["weighted"]))
    found = {}
    for key, curve in curves.items():
        distances, scores = np.array(sorted(curve)).T
        found[key] = float(np.interp(FAR, distances, scores))
    return found


def facts(scale: Scale, folder: Path) -> Json:
    """When, where and with what it was measured, and how long every stage took where."""
    marks = Marks(folder / "_done")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "scale": scale.name,
        "date": time.strftime("%Y-%m-%d"),
        "seed": SEED,
        "commit": commit or None,
        "machine": machine(),
        "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "stages": {stage.name: marks.durations(stage) for stage in stages(scale, folder)},
    }
