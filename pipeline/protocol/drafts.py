"""What a coordinator asks of the model that proposes tokens, and what it is told.

The model holds no state that matters: a request has the whole text of a row, and what the model has kept of earlier
ones only saves it from reading that text again. So rows that begin again, in any slot, need no message of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pipeline.protocol.messages import MemoryBudget

OF_MODEL = "the model that proposes tokens"  # in messages


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Asks for the token that follows a text.

    Args:
        slot: where the row runs; what the slot read last is compared with the text.
        text: token ids, at least one.
        uniform: the draw of the token's step.
        draw: temperature and top_p.
    """

    slot: int
    text: Sequence[int]
    uniform: float
    draw: tuple[float, float]


class Proposed(NamedTuple):
    """A token that may come next.

    Args:
        token: its id.
        probability: of it under the model, among its candidates.
    """

    token: int
    probability: float


class DraftingModel(Protocol):
    """A small model in the coordinator's own process."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposed | None]:
        """What comes next in each text, in one pass; None where the text is longer than the model's context.

        Raises:
            HostOutOfMemory: an allocation failed.
        """

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of `row_tokens` tokens, and what is free."""

    def resize(self, num_slots: int) -> None:
        """Forget every row and hold `num_slots` at once from now on; 0 frees all memory that rows take."""
