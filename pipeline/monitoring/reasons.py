"""Why answers failed: reasons by kind, each with a count and a few rows as examples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KINDS_KEPT = 20
OTHER_REASONS = "other reasons"
EXAMPLES_KEPT = 3
LONGEST_REASON = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """One failed row.

    Args:
        row_id: of the row.
        reason: its own, with all values.
    """

    row_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failures:
    """The answers that failed for one kind of reason.

    Args:
        count: how many.
        examples: the first few rows, each once.
    """

    count: int = 0
    examples: tuple[Example, ...] = ()

    def __add__(self, other: Failures) -> Failures:
        by_row = {example.row_id: example for example in (*other.examples, *self.examples)}
        ordered = dict.fromkeys(example.row_id for example in (*self.examples, *other.examples))
        return Failures(self.count + other.count, tuple(by_row[row_id] for row_id in list(ordered)[:EXAMPLES_KEPT]))

    def describe(self, kind: str) -> str:
        """The count, the first row's whole reason and the ids of the rows that are known."""
        if not self.examples:
            return f"{self.count:,} x {kind}"
        ids = ", ".join(example.row_id for example in self.examples)
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count:,} x {self.examples[0].reason} (rows {ids}{more})"


FailuresByKind = Mapping[str, Failures]


def kind_of(reason: str) -> str:
    """The kind of a reason: its text without the place, the numbers and the quoted values."""
    without_place = re.sub(r"^(line|row) \d+ of .*?(: | (?=is ))", "", reason)
    return re.sub(r"'[^']*'|\"[^\"]*\"|(?<![\w-])\d+(\.\d+)?\b", "…", without_place)[:200]


def failures_of(failed: Iterable[tuple[str, str | None]]) -> FailuresByKind:
    """Failed rows, as row id and reason, by kind of reason; most frequent first, rare kinds together."""
    found: dict[str, Failures] = {}
    for row_id, given in failed:
        reason = given or "no reason given"
        kind, one = kind_of(reason), Failures(1, (Example(row_id, reason[:LONGEST_REASON]),))
        found[kind] = found[kind] + one if kind in found else one
    return _bounded(found)


def add_failures(first: FailuresByKind, second: FailuresByKind) -> FailuresByKind:
    """The failures of both, most frequent first."""
    if not (first or second):
        return first
    return _bounded(
        {kind: first.get(kind, Failures()) + second.get(kind, Failures()) for kind in {**first, **second}}
    )


def _bounded(found: FailuresByKind) -> FailuresByKind:
    ordered = sorted(found.items(), key=lambda item: (item[0] == OTHER_REASONS, -item[1].count))
    kept, rest = dict(ordered[:KINDS_KEPT]), ordered[KINDS_KEPT:]
    if rest:
        kept[OTHER_REASONS] = Failures(sum(failures.count for _, failures in rest))
    return kept
