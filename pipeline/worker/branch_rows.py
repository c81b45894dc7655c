"""A row as a model reads it that scores branches: a prompt and the base's answer so far, candidates after it.

T tokens of a reading, H the width of the hidden states, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pipeline.attention.branches import Branch, Reading, RowCache
from pipeline.attention.prefixes import Prompt


@dataclass(slots=True)
class BranchRow:
    """A row of one role.

    Args:
        prompt: what it begins with. Tokens that the row kept when it was admitted again may be at its end.
        answer: the base's tokens after the prompt.
        role: the index of its role.
        adapter: the number of its role's adapter; 0 is none.
        cache: keys and values of what was read.
        known: what its scorer remembers of the cached tokens.
        scored: the last candidates and what each adds to the score, so that a repeated call returns the same.
    """

    prompt: Prompt
    answer: list[int]
    role: int
    adapter: int = 0
    cache: RowCache = field(default_factory=RowCache)
    known: Any = None
    scored: tuple[list[int], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and an answer as a model reads them.

    Args:
        tokens: of both, in the model's own vocabulary; the end of a finished answer is the last one.
        is_ended: whether the answer is finished.
        pending: bytes of a character that is not complete yet, which no token stands for.
    """

    tokens: list[int]
    is_ended: bool = False
    pending: bytes = b""


class ScoringRequest(Protocol):
    """Texts of a row that are to be scored: what is read for them, and their scores from its hidden states."""

    @property
    def reading(self) -> Reading:
        """The tokens that a pass reads for them."""

    def finish(self, states_TH: Tensor) -> Tensor:
        """The score [N] of each text, from the hidden state of each token of the reading."""


class Scorer(Protocol):
    """Makes scores of texts out of hidden states."""

    def request(self, row: BranchRow, prefix: Text, texts: Sequence[Text]) -> ScoringRequest:
        """What has to be read so that texts can be scored; the row keeps the tokens of `prefix`."""


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
