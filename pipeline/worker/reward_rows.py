"""A row as a reward model reads it: a prompt and the base's answer so far, with candidates as branches behind it.

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
    """A row of one role: its prompt, the base's tokens after it, and what was read of both.

    Tokens that it kept when it was admitted again may be at the prompt's end. `score` is that of the newest token in
    the cache; `answered` the last candidates and what they add, so that a repeated call gets the same.
    """

    prompt: Prompt
    answer: list[int]
    label: int
    cache: RowCache = field(default_factory=RowCache)
    score: Tensor | None = None
    answered: tuple[list[int], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A row, candidates, and a reading with the place of each candidate's last token; None: it is the prefix."""

    row: RewardRow
    ids: list[int]
    reading: Reading
    places: Sequence[int | None]

    def settle(self, scores_TL: Tensor) -> None:
        """Keep the prefix's score and note what each candidate adds to it."""
        row, scores_T = self.row, scores_TL[:, self.row.label]
        if self.reading.trunk:
            row.score = scores_T[len(self.reading.trunk) - 1]
        assert row.score is not None
        after = [row.score if place is None else scores_T[place] for place in self.places]
        row.answered = (self.ids, torch.stack(after) - row.score if after else scores_T[:0])


def lay_out(
    cache: RowCache, prefix: Sequence[int], followers: Sequence[Sequence[int]]
) -> tuple[Reading, list[int | None]]:
    """Read the prefix as trunk, from where the cache ends, and what follows as branches where it leaves the prefix.

    The places are those of each follower's last token in the reading; None for the prefix that was read before.
    """
    kept = num_shared(cache.tokens, prefix)
    if kept == len(prefix) < len(cache.tokens):
        kept -= 1  # the score of the prefix's own last token is not known
    branches: list[Branch] = []
    places: list[int | None] = []
    count = len(prefix) - kept
    for follower in followers:
        fork = num_shared(prefix, follower)
        if fork == len(follower):
            if fork > kept or fork == len(prefix):
                places.append(fork - kept - 1 if fork > kept else None)
                continue
            fork -= 1
        branches.append(Branch(fork, follower[fork:]))
        count += len(follower) - fork
        places.append(count - 1)
    return Reading(cache, kept, prefix[kept:], branches), places


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
