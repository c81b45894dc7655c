"""A row as a reward model reads it: a prompt and the base's answer so far, with candidates as branches after it.

N candidates, T tokens of a reading, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.attention.branches import Branch, Reading, RowCache
from pipeline.attention.prefixes import Prompt


@dataclass(slots=True)
class RewardRow:
    """A row of one role.

    Args:
        prompt: what it begins with. Tokens that the row kept when it was admitted again may be at its end.
        answer: the base's tokens after the prompt.
        label: the index of the model's output that counts.
        cache: keys and values of what was read.
        score: of the newest token in the cache.
        scored: the last candidates and what each adds to the score, so that a repeated call returns the same.
    """

    prompt: Prompt
    answer: list[int]
    label: int
    cache: RowCache = field(default_factory=RowCache)
    score: Tensor | None = None
    scored: tuple[list[int], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """Candidates of a row that are to be scored.

    Args:
        row: the row.
        ids: the candidates.
        reading: of the prefix's new tokens and the candidates.
        places: of each candidate's last token in the reading; None where that is the prefix's last token.
    """

    row: RewardRow
    ids: list[int]
    reading: Reading
    places: Sequence[int | None]

    def finish(self, scores_TL: Tensor) -> None:
        """Store the prefix's score and what each candidate adds to it, from the scores of the reading's tokens."""
        row, scores_T = self.row, scores_TL[:, self.row.label]
        if self.reading.trunk:
            row.score = scores_T[len(self.reading.trunk) - 1]
        assert row.score is not None
        after = [row.score if place is None else scores_T[place] for place in self.places]
        row.scored = (self.ids, torch.stack(after) - row.score if after else scores_T[:0])


def lay_out(
    cache: RowCache, prefix: Sequence[int], continuations: Sequence[Sequence[int]]
) -> tuple[Reading, list[int | None]]:
    """A reading of the prefix as trunk, from where the cache ends, with continuations as branches.

    Tokens of another vocabulary may merge with what comes after them, so a continuation need not begin with the whole
    prefix: its branch starts where it first differs.

    Args:
        cache: of the row; what does not belong to the prefix is overwritten.
        prefix: token ids that the row keeps.
        continuations: whole sequences of token ids.

    Returns:
        The reading, and the place of each continuation's last token in it; None where that is the last token of a
        prefix that was read before.
    """
    kept = num_shared(cache.tokens, prefix)
    if kept == len(prefix) < len(cache.tokens):
        kept -= 1  # the score of the prefix's own last token is not known
    branches: list[Branch] = []
    places: list[int | None] = []
    count = len(prefix) - kept
    for continuation in continuations:
        fork = num_shared(prefix, continuation)
        if fork == len(continuation):
            if fork > kept or fork == len(prefix):
                places.append(fork - kept - 1 if fork > kept else None)
                continue
            fork -= 1
        branches.append(Branch(fork, continuation[fork:]))
        count += len(continuation) - fork
        places.append(count - 1)
    return Reading(cache, kept, prefix[kept:], branches), places


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
