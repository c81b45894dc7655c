"""Preference pairs: two answers to one prompt under one weight vector, of which one has the higher score.

Answers under different weights are never paired, because each was decoded to be better under its own weights. Answers
of different rules and agent temperatures may be paired, where their weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipeline.synthesis.candidates import Candidate
from pipeline.synthesis.settings import PairsConfig, PairSelection

SINGLE, MARGIN = "no answer to pair with", "pairs.min_margin"
BETWEEN, OVER = "neither best nor worst", "pairs.max_pairs"


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer and its score.

    Args:
        candidate: the answer.
        score: what ranks it.
        is_weak: whether it may only be the rejected side of a pair.
    """

    candidate: Candidate
    score: float
    is_weak: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt: `chosen` has the higher score, `rejected` the lower one."""

    chosen: Scored
    rejected: Scored

    @property
    def margin(self) -> float:
        return self.chosen.score - self.rejected.score


def make_pairs(answers: Sequence[Scored], settings: PairsConfig) -> tuple[list[Pair], list[str | None]]:
    """Pair the answers to one prompt under one weight vector.

    Args:
        answers: different answers with their scores.
        settings: how to pair them.

    Returns:
        The pairs, widest margin first, and for each answer the reason why it is in no pair (None when it is in one).
    """
    is_best_worst = settings.select is PairSelection.BEST_WORST
    ordered = sorted(answers, key=lambda each: -each.score)  # stable: the earlier of equals comes first
    possible = sorted(_possible(ordered, settings), key=lambda pair: -pair.margin)
    wide = [pair for pair in possible if pair.margin >= settings.min_margin and pair.margin > 0]
    pairs = wide[: 1 if is_best_worst else settings.max_pairs]
    used, pairable = _members(pairs), _members(wide)
    unpairable = SINGLE if not possible else BETWEEN if is_best_worst and pairs else MARGIN

    def reason(answer: Scored) -> str | None:
        if id(answer) in used:
            return None
        return OVER if id(answer) in pairable else unpairable

    return pairs, [reason(answer) for answer in answers]


def _possible(ordered: Sequence[Scored], settings: PairsConfig) -> Iterator[Pair]:
    """Pairs whose better answer is not weak, in order of score."""
    if settings.select is PairSelection.ALL:
        yield from (Pair(better, worse) for better, worse in combinations(ordered, 2) if not better.is_weak)
        return
    best = next((at for at, each in enumerate(ordered) if not each.is_weak), None)
    if best is not None and best < len(ordered) - 1:
        yield Pair(ordered[best], ordered[-1])


def _members(pairs: Sequence[Pair]) -> set[int]:
    return {id(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)}
