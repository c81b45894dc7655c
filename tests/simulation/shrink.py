"""Delta debugging: the fewest faults, and the plainest job, with which a schedule still fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from simulation.schedule import Schedule, run_schedule

T = TypeVar("T")


def fails(schedule: Schedule) -> bool:
    return bool(run_schedule(schedule).violations)


def shrink(schedule: Schedule, is_bad: Callable[[Schedule], bool] = fails) -> Schedule:
    """A schedule that fails as well, from which no fault can be left out, with as plain a job as possible."""
    faults = fewest(schedule.faults, lambda some: is_bad(replace(schedule, faults=tuple(some))))
    schedule = replace(schedule, faults=tuple(faults))
    starts_s = fewest(schedule.starts_s, lambda some: bool(some) and is_bad(replace(schedule, starts_s=tuple(some))))
    schedule = replace(schedule, starts_s=tuple(starts_s))
    plainest = {"replicas": 1, "is_late": False, "has_drafts": False, "topology": "lone", "slots": 2}
    for plainer in (*({name: value} for name, value in plainest.items()), {"starts_s": (0.0,)}):
        candidate = replace(schedule, **plainer)
        if candidate != schedule and is_bad(candidate):
            schedule = candidate
    return schedule


def fewest(items: Sequence[T], is_bad: Callable[[Sequence[T]], bool]) -> list[T]:
    """A part of the items that is bad and of which no single one can be left out (the ddmin algorithm).

    Args:
        items: are bad together.
        is_bad: whether some of them are.
    """
    left, count = list(items), 2
    while left:
        size = max(1, -(-len(left) // count))
        pieces = [left[at : at + size] for at in range(0, len(left), size)]
        rests = [[each for piece in pieces if piece is not out for each in piece] for out in pieces]
        smaller = next((some for some in (*pieces, *rests) if len(some) < len(left) and is_bad(some)), None)
        if smaller is not None:
            left, count = list(smaller), 2
        elif size == 1:
            return left
        else:
            count *= 2
    return left
