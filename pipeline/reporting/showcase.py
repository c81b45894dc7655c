"""Choose the rows that the report shows in full, and describe them as cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.variants import names_of
from pipeline.reporting.examples import describe_example, fetch_rows
from pipeline.reporting.tally import Place, Tally
from pipeline.storage.run import Run

Card = dict[str, Any]


def collect_examples(run: Run, tally: Tally, judges: Sequence[str]) -> dict[str, Any]:
    """Cards of the best and worst answers, of pairs of rules on one prompt, and of random answers with a trace.

    `again` marks a card whose row was shown before; its table of tokens is not printed again.
    """
    rankings = {"weighted": tally.by_total, "worst": tally.by_worst, "contrast": tally.by_contrast}
    ends = {name: ranking.ends() for name, ranking in rankings.items() if ranking.highest}
    by_chance = tally.by_chance.highest[: tally.by_chance.size]
    places = [place for best, worst in ends.values() for place in (*best, *worst)]
    partners = [_partner(place) for place in places if place.partner is not None]
    rows = fetch_rows(run, [*places, *partners, *by_chance], judges)
    seen: set[tuple[str, int]] = set()
    methods = names_of(run.plan.variants)

    def card(place: Place) -> Card:
        key = (place.file, place.index)
        method = methods[rows[key].get("variant") or 0]
        shown = describe_example(rows[key], run.plan.principal_names, method)
        shown |= {"score": place.score, "again": key in seen}
        seen.add(key)
        return shown

    def cards(chosen: Iterable[Place]) -> list[Card]:
        return [card(place) for place in chosen]

    def pairs(chosen: Iterable[Place]) -> list[dict[str, Any]]:
        return [{"gain": place.score, "ours": card(place), "theirs": card(_partner(place))} for place in chosen]

    sides = {name: {"best": best, "worst": worst} for name, (best, worst) in ends.items()}
    contrasts = {side: pairs(chosen) for side, chosen in sides.pop("contrast", {}).items()}
    examples = {name: {side: cards(chosen) for side, chosen in both.items()} for name, both in sides.items()}
    return {
        "examples": examples,
        "contrasts": {side: chosen for side, chosen in contrasts.items() if chosen},
        "traced": [shown for shown in cards(by_chance) if shown["tokens"]],
    }


def _partner(place: Place) -> Place:
    assert place.partner is not None
    return replace(place, index=place.partner, partner=None)
