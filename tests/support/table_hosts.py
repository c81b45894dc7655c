"""A host whose model is a table: answers cost nothing, so that a run is all coordination, storage and Ray.

The next token is a digest of the prompt and the number of tokens so far. A host that begins again from the prompt
gives the same tokens, as a real one does.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import HostWork, MemoryBudget, Position, Step, Terms, TokenOutcome

END, FIRST_LETTER, LETTERS = 0, 70, 26  # ids of the tiny tokenizer
LONGEST = 4


def token_after(prompt: bytes, count: int) -> int:
    """The token behind `count` tokens of the answer to a prompt: a letter, or the end."""
    digest = hashlib.blake2b(prompt, digest_size=LONGEST).digest()
    return END if count > digest[0] % LONGEST else FIRST_LETTER + digest[count % LONGEST] % LETTERS


class TableHost:
    """Takes the place of a lone host (`Samples`).

    Args:
        host: the real one, which is asked nothing.
        pause_s: how long a step takes.
    """

    runs_ahead = False

    def __init__(self, host: Any, pause_s: float) -> None:
        self._host = host
        self._pause_s = pause_s
        self._rows: dict[int, tuple[bytes, int]] = {}

    def resize(self, num_slots: int) -> None:
        self._rows.clear()

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        budget: MemoryBudget = self._host.memory_budget(row_tokens)
        return budget

    def work(self) -> HostWork:
        return HostWork()

    def advance(self, at: Position, step: Step) -> None:
        for admission in step.admissions:
            prompt = repr([list(tokens) for tokens in admission.prompts.values()]).encode()
            self._rows[admission.slot] = (prompt, len(admission.answer))
        for slot in step.slots:
            prompt, count = self._rows[slot]
            self._rows[slot] = (prompt, count + 1)

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        self.advance(at, step)
        time.sleep(self._pause_s)
        return Reply.of([self._outcome(slot, each) for slot, each in zip(slots, terms, strict=True)])

    def _outcome(self, slot: int, terms: Terms) -> TokenOutcome:
        prompt, count = self._rows[slot]
        nothing = tuple(0.0 for _ in terms.weights)
        return TokenOutcome(
            token_id=token_after(prompt, count),
            rewards=tuple(0.01 * (count + 1) for _ in terms.weights),
            payments=nothing,
            thresholds=nothing,
            base_logprob=-1.0,
            logprob=-1.0,
            kl=0.0,
            covered_mass=1.0,
            residual=0.0,
            status=0,
            num_steps=1,
        )


@dataclass(frozen=True)
class WrapTable:
    """Puts a table in the place of every host."""

    pause_s: float = 0.0

    def __call__(self, host: Any) -> Any:
        return TableHost(host, self.pause_s)
