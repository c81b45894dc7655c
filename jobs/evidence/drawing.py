"""Which charts are drawn of what the evidence found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cage.rule_names import RuleName
from jobs.evidence.charts import Panel, write_chart
from jobs.evidence.results import Json, pairs_of_principals
from jobs.evidence.scales import Scale
from jobs.evidence.stages import PAIRS

SHOWN = (0.2, 0.5, 0.8)  # of many weight vectors in order, where those lie that a chart shows


def draw_answers(scale: Scale, judged: Sequence[Json], place: Path) -> None:
    """A chart of every evaluation: scores by weight at a target of KL, by KL over a sweep of agent temperatures."""
    for evaluation in judged:
        names, prompts = PAIRS[evaluation["set"].partition("_")[2]], evaluation["prompts"]
        file = place / f"{scale.name}-{evaluation['set']}-{evaluation['unit']}-{evaluation['at']}.svg"
        if evaluation["at"] == "kl":
            panels = _by_weight(evaluation["points"], names)
            title = f"Mean scores of answers to {prompts} held-out prompts (target: {scale.target_kl:g} nats a token)"
            write_chart(file, title, f"weight of {names[0]}", "score", panels)
        else:
            panels = _by_kl(evaluation["equal_kl"], names)
            title = f"Weighted score at equal KL ({prompts} prompts)"
            write_chart(file, title, "KL, nats a token", "weighted score", panels)


def _by_weight(points: Sequence[Json], names: Sequence[str]) -> list[Panel]:
    """A panel for each objective; the base, which has no weights, is level."""
    places = sorted({each["weights"][names[0]] for each in points if each["rule"] != "base"})
    scores: dict[tuple[str, float], Json] = {}
    for point in points:
        for weight in places if point["rule"] == "base" else [point["weights"][names[0]]]:
            scores[point["rule"], weight] = point["objectives"]
    rules = list(dict.fromkeys(rule for rule, _ in scores))
    return [
        Panel(name, places, {rule: [scores[rule, weight][name] for weight in places] for rule in rules})
        for name in names
    ]


def _by_kl(levels: Sequence[Json], names: Sequence[str]) -> list[Panel]:
    """A panel for each weight vector, or for three of many, at the KL levels that all rules reach."""
    panels = []
    vectors = list({tuple(each["weights"].items()): each["weights"] for each in levels}.values())
    if len(vectors) > len(SHOWN):
        vectors = [vectors[round(at * (len(vectors) - 1))] for at in SHOWN]
    for weights in vectors:
        here = [each for each in levels if each["weights"] == weights]
        places = sorted({round(each["kl_per_token"], 3) for each in here})
        rules = list(dict.fromkeys(each["rule"] for each in here))
        lines = {rule: [each["weighted"] for each in here if each["rule"] == rule] for rule in rules}
        panels.append(Panel(", ".join(f"{name} {weights[name]:g}" for name in names), places, lines))
    return panels


def draw_questions(scale: Scale, asked: Json, place: Path) -> None:
    """The charts of the what-if questions."""
    sets = pairs_of_principals(scale)
    write_chart(
        place / "louder.svg",
        "What is left for a principal when the other one is louder (equal KL, 0.5 nats a token)",
        "scale of the louder one",
        "gain, nats a token",
        [_panel(title, asked["scaled"], pair, "scale", "other", least=1.0) for title, pair in sets.items()],
        common=False,
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
            common=False,
        )
    groups = list(dict.fromkeys(tuple(each["group"]) for each in asked["many"]))
    rows = {(tuple(each["group"]), each["rule"]): each for each in asked["many"]}
    rules = list(dict.fromkeys(each["rule"] for each in asked["many"]))
    titles = {"gain": "weighted gain", "worst": "the worst principal's gain"}
    write_chart(
        place / "many.svg",
        "Three to eight principals: shares of the weighted sum's gain (equal KL)",
        "principals",
        "share",
        [
            Panel(
                title,
                [_name_of(group) for group in groups],
                {
                    rule: [_share(rows[group, rule][key], rows[group, RuleName.LINEAR][key]) for group in groups]
                    for rule in rules
                },
            )
            for key, title in titles.items()
        ],
    )


def _share(gain: float, of: float) -> float:
    """NaN, which is not drawn, where there is nothing to share."""
    return gain / of if of > 0 else float("nan")


def _name_of(group: Sequence[str]) -> str:
    """How many principals, and which kind, where they are of one kind."""
    prompted = sum("_prompted" in name for name in group)
    return f"{len(group)}" + (" prompted" if prompted == len(group) else "" if prompted else " trained")


def _panel(
    title: str, rows: Sequence[Json], pair: Sequence[str], x: str, y: str, *, least: float = float("-inf")
) -> Panel:
    of_pair = [each for each in rows if each["pair"] == list(pair) and each[x] >= least]
    places = list(dict.fromkeys(each[x] for each in of_pair))
    rules = list(dict.fromkeys(each["rule"] for each in of_pair))
    by_place = {(each["rule"], each[x]): each[y] for each in of_pair}
    return Panel(title.replace("_", ", "), places, {rule: [by_place[rule, at] for at in places] for rule in rules})
