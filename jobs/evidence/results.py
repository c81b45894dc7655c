"""What the stages found, as one small file of numbers and a few charts."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from jobs.evidence import questions
from jobs.evidence.charts import Panel, write_chart
from jobs.evidence.scales import Scale
from jobs.evidence.stages import HALVES, PAIRS, SEED, Marks
from pipeline.advice.recording import RecordedGames
from pipeline.evaluation.metrics import spearman

Json = dict[str, Any]
TARGETS = (0.1, 0.5)
FAR = 0.5  # nats a token at which what-if questions are asked
PROMPTED = ("cheerful", "formal", "simple")
KINDS = {"trained": "", "prompted": "_prompted"}  # what the names of their principals end with
NUMBERS = ("kl_per_token", "num_tokens", "weighted", "worst_principal")


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
    """How many held-out pairs every trained principal orders right."""
    for half in HALVES:
        for objective in scale.objectives:
            file = folder / f"principals-{half}" / objective / objective / "training.json"
            if file.exists():
                facts = json.loads(file.read_text(encoding="utf-8"))
                yield {"half": half, "objective": objective, "held_out": facts["held_out"][objective]}


def evaluations(scale: Scale, folder: Path) -> Iterator[Json]:
    """Every finished evaluation: its points, and the differences of rules with their intervals."""
    for unit in scale.units:
        for name in scale.sets:
            for at in ("kl", "temperature"):
                file = folder / f"{name}-{unit}-{at}" / "_metrics.json"
                if not file.exists():
                    continue
                metrics = json.loads(file.read_text(encoding="utf-8"))
                yield {
                    "set": name,
                    "unit": unit,
                    "at": at,
                    "prompts": metrics["num_prompts"],
                    "answers": metrics["num_answers"],
                    "rules": metrics["rules"],
                    "points": [
                        {
                            **{key: point[key] for key in ("rule", "agent_temperature", "weights", "objectives")},
                            **{key: point[key] for key in (*NUMBERS, "scores", "intervals")},
                        }
                        for point in metrics["points"]
                    ],
                    "differences": [
                        each for each in metrics["differences"] if each["metric"] in ("mip", "worst_principal")
                    ],
                    "control": metrics["control"],
                }


def prediction(scale: Scale, asked: Json, judged: Sequence[Json]) -> Iterator[Json]:
    """Whether gains on recorded rewards say which rule judges prefer on held-out prompts, at equal KL.

    `soft_threshold` was judged at k = 1, so the other k are left out.
    """
    for evaluation in judged:
        if evaluation["at"] != "kl" or evaluation["unit"] != "token":
            continue
        one, other = pairs_of_principals(scale)[evaluation["set"]]
        for weight in sorted({each["weight"] for each in asked["equal_kl"]}):
            expected = {
                each["rule"].removesuffix(" 1"): each["share"]
                for each in asked["equal_kl"]
                if each["pair"] == [one, other] and each["weight"] == weight and each["target_kl"] == FAR
            }
            name = PAIRS[evaluation["set"].partition("_")[2]][0]
            found = {
                point["rule"]: point["weighted"]
                for point in evaluation["points"]
                if abs(point["weights"].get(name, -1.0) - weight) < 1e-9 and point["rule"] in expected
            }
            if len(found) < 2:
                continue
            rules = list(found)
            yield {
                "set": evaluation["set"],
                "weight": weight,
                "rank_correlation": spearman(
                    *(torch.tensor([side[rule] for rule in rules]).double().numpy() for side in (expected, found))
                ),
                "expected": {rule: expected[rule] for rule in rules},
                "judged": found,
            }


def facts(scale: Scale, folder: Path) -> Json:
    """When, where and with what it was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "scale": scale.name,
        "date": time.strftime("%Y-%m-%d"),
        "seed": SEED,
        "commit": commit or None,
        "processor": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "seconds": Marks(folder / "_done").seconds(),
    }


def draw(scale: Scale, asked: Json, place: Path) -> None:
    """The charts of the what-if questions."""
    sets = pairs_of_principals(scale)
    write_chart(
        place / "louder.svg",
        "What is left for a principal when the other one is louder (equal KL, 0.5 nats a token)",
        "scale of the louder one",
        "gain, nats a token",
        [_panel(title, asked["scaled"], pair, "scale", "other", least=1.0) for title, pair in sets.items()],
    )
    write_chart(
        place / "mis-scaled.svg",
        "Weighted gain when one principal is mis-scaled, as a share of the weighted sum's",
        "scale of one principal",
        "share",
        [_panel(title, asked["scaled"], pair, "scale", "share") for title, pair in sets.items()],
    )
    write_chart(
        place / "noise.svg",
        "Weighted gain under white noise in q, as a share of the weighted sum's (equal KL)",
        "noise, nats",
        "share",
        [_panel(title, asked["noisy"], pair, "noise", "share") for title, pair in sets.items()],
    )
    for who in ("liar", "victim"):
        write_chart(
            place / f"lie-{who}.svg",
            f"What an inflated report brings the {who}, at the agent temperature of the truth",
            "factor of the lie",
            "true gain, nats a token",
            [_panel(title, asked["lying"], pair, "lie", who) for title, pair in sets.items()],
        )
    groups = {f"{each['principals']}: {', '.join(each['group'])}": each["group"] for each in asked["many"]}
    sizes = [len(group) for group in groups.values()]
    rules = list(dict.fromkeys(each["rule"] for each in asked["many"]))
    lines = {
        key: {
            rule: [
                each[key]
                for group in groups.values()
                for each in asked["many"]
                if each["group"] == group and each["rule"] == rule
            ]
            for rule in rules
        }
        for key in ("gain", "worst")
    }
    write_chart(
        place / "many.svg",
        "Three to eight principals with equal weights (equal KL)",
        "principals",
        "gain, nats a token",
        [
            Panel({"gain": "weighted gain", "worst": "the worst principal's gain"}[key], sizes, by_rule)
            for key, by_rule in lines.items()
        ],
    )


def _panel(
    title: str, rows: Sequence[Json], pair: Sequence[str], x: str, y: str, *, least: float = float("-inf")
) -> Panel:
    of_pair = [each for each in rows if each["pair"] == list(pair) and each[x] >= least]
    places = list(dict.fromkeys(each[x] for each in of_pair))
    rules = list(dict.fromkeys(each["rule"] for each in of_pair))
    by_place = {(each["rule"], each[x]): each[y] for each in of_pair}
    return Panel(title.replace("_", ", "), places, {rule: [by_place[rule, at] for at in places] for rule in rules})
