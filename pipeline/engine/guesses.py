"""Proposed tokens: what they are, and how often such ones were drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.config.drafts import DraftSource

FADES_AT = 256  # proposals, after which earlier ones count half

# variant, source, and what it knows of how sure a proposal is: a level of its own
Key = tuple[int, DraftSource, int]


class Proposal(NamedTuple):
    """A proposed token.

    Args:
        token: its id.
        keys: of the proposals that it is counted among; the first one says how likely it is.
    """

    token: int
    keys: tuple[Key, ...]


@dataclass(slots=True)
class Tally:
    """Proposed tokens of one source.

    Args:
        drafted: tokens that passes verified.
        accepted: tokens among them that were drawn.
    """

    drafted: int = 0
    accepted: int = 0


class Rates:
    """How often a proposed token is drawn, where those proposed before it were."""

    def __init__(self) -> None:
        self._counts: dict[Key, list[float]] = defaultdict(lambda: [1.0, 2.0])

    def note(self, key: Key, *, is_hit: bool) -> None:
        """Count a proposal."""
        counts = self._counts[key]
        counts[0] += is_hit
        counts[1] += 1
        if counts[1] > FADES_AT:
            counts[:] = counts[0] / 2, counts[1] / 2

    def of(self, key: Key) -> float:
        """The share of such proposals that were drawn."""
        hits, count = self._counts[key]
        return hits / count


@dataclass(frozen=True, slots=True)
class Guess:
    """What a row may draw next.

    Args:
        source: that it is from.
        tokens: proposed.
        chances: that the tokens up to each one are all drawn.
    """

    source: DraftSource
    tokens: Sequence[int]
    chances: Sequence[float]

    @classmethod
    def of(cls, source: DraftSource, proposals: Sequence[Proposal], rates: Rates) -> Guess:
        """Proposals that follow one another, as likely as such ones were so far."""
        chances, chance = [], 1.0
        for proposal in proposals:
            chance *= rates.of(proposal.keys[0])
            chances.append(chance)
        return cls(source, [proposal.token for proposal in proposals], chances)

    def first(self, count: int) -> Guess:
        """Its first `count` tokens."""
        return Guess(self.source, self.tokens[:count], self.chances[:count])
