"""How fast a run was, from its commit records: tokens a second, and tokens of an answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.storage.commits import CommitRecord


@dataclass(frozen=True, slots=True)
class Pace:
    """What was measured.

    Args:
        tokens_per_second: of the whole run, all replicas together.
        tokens_per_answer: of answers, failed ones included.
        num_shards: whose commits it is from.
    """

    tokens_per_second: float
    tokens_per_answer: float
    num_shards: int

    def seconds_for(self, num_answers: int) -> float:
        """The time that so many answers more take, as far as they are like those before."""
        return num_answers * self.tokens_per_answer / self.tokens_per_second


def measure_pace(records: Iterable[CommitRecord], *, newest: int | None = None) -> Pace | None:
    """The pace of a run; None before it has two commits some time apart.

    The first record says when the time begins: its own tokens, and what loading took, are before that.

    Args:
        records: of the committed shards.
        newest: how many of the last shards the speed is taken from; None: all.
    """
    ordered = sorted(records, key=lambda record: record.committed_at)
    last = ordered if newest is None else ordered[-newest:]
    answers = sum(record.rows + record.failed for record in ordered)
    if len(last) < 2 or not answers:
        return None
    seconds = last[-1].committed_at - last[0].committed_at
    tokens = sum(record.tokens for record in last[1:])
    if seconds <= 0 or not tokens:
        return None
    return Pace(tokens / seconds, sum(record.tokens for record in ordered) / answers, len(last))
