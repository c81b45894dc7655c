"""Principals that value no token: their q is 0, or one constant, at every token of a run's answers.

Such a principal steers nothing, and nothing fails: only its values show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.principals.kinds import KINDS
from pipeline.records import Record

TOLERANCE = 1e-4  # nats; rounding in half precision stays below, and q of a principal that steers is far above
FEWEST_TOKENS = 8  # with fewer tokens nothing is said
FIRST_ANSWERS = 8  # while a run goes on, nothing is said before so many answers


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The values of one principal over the drawn tokens of some answers.

    Args:
        answers: how many answers.
        tokens: their tokens.
        low: the lowest q, in nats.
        high: the highest.
        left_out: proposals of games over blocks or answers that it gave no score.
    """

    answers: int = 0
    tokens: int = 0
    low: float = math.inf
    high: float = -math.inf
    left_out: int = 0

    def __add__(self, other: ValueRange) -> ValueRange:
        return ValueRange(
            self.answers + other.answers,
            self.tokens + other.tokens,
            min(self.low, other.low),
            max(self.high, other.high),
            self.left_out + other.left_out,
        )

    @property
    def is_zero(self) -> bool:
        """Whether q is 0 at every token."""
        return self.tokens >= FEWEST_TOKENS and max(abs(self.low), abs(self.high)) <= TOLERANCE

    @property
    def is_constant(self) -> bool:
        """Whether q is the same at every token. Answers of one token to the same prompt are too little to say so."""
        size = max(1.0, abs(self.low), abs(self.high))
        is_enough = self.tokens >= max(FEWEST_TOKENS, 2 * self.answers)
        return is_enough and self.high - self.low <= TOLERANCE * size


Values = Mapping[str, ValueRange]


def add_values(first: Values, second: Values) -> Values:
    """The values of both sets of answers, by principal."""
    if not (first and second):
        return first or second
    return {name: first.get(name, ValueRange()) + second.get(name, ValueRange()) for name in {**first, **second}}


def values_of(records: Iterable[Record]) -> Values:
    """The values of each principal over the answers that were drawn."""
    total: Values = {}
    for record in records:
        one = {
            name: ValueRange(
                1, record.num_tokens, low, high, sum(each.rewards[name] is None for each in record.proposals)
            )
            for name, (low, high) in record.values.items()
        }
        total = add_values(total, one)
    return total


def describe_silent(values: Values, principals: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """One line for each principal that values no token, or gave proposals no score, by name.

    What was seen, and the likely reasons.

    Args:
        values: by principal.
        principals: the sections of the configuration, as plain values.
    """
    lines = {}
    for name, found in values.items():
        parts = []
        if found.is_zero or found.is_constant:
            value = "0" if found.is_zero else f"{found.low:.6g}"
            kind = KINDS.get(str(principals.get(name, {}).get("kind")))
            reasons = f" Likely reasons: {kind.silent_because}." if kind is not None else ""
            parts.append(
                f"principal {name} has not valued any token: its q is {value} at all {found.tokens:,} tokens of "
                f"{found.answers:,} answers, so it steers nothing.{reasons}"
            )
        if found.left_out:
            parts.append(
                f"principal {name} gave no score to {found.left_out:,} proposal{'s' * (found.left_out != 1)}: the "
                "games were without them, and their rewards in the column proposals are null."
            )
        if parts:
            lines[name] = " ".join(parts)
    return lines


class SilenceWatch:
    """Reports each silent principal of a running command once.

    Args:
        principals: the sections of the configuration, as plain values.
    """

    def __init__(self, principals: Mapping[str, Mapping[str, Any]]) -> None:
        self._principals = principals
        self._reported: set[str] = set()

    def lines(self, values: Values, *, is_last: bool = False) -> list[str]:
        """The lines that are new with these values; before `is_last` only those that enough answers bear out."""
        enough = values
        if not is_last:  # how many proposals are left out is known in the end
            some = {name: found for name, found in values.items() if found.answers >= FIRST_ANSWERS}
            enough = {name: replace(found, left_out=0) for name, found in some.items()}
        found = describe_silent(enough, self._principals)
        new = [line for name, line in found.items() if name not in self._reported]
        self._reported.update(found)
        return new
