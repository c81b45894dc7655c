"""From one vocabulary to another: an answer of the base in the tokens of a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Retokeniser:
    """Decodes an answer to text and tokenizes it with the reward model's tokenizer. Picklable.

    Args:
        base: the base's tokenizer.
        own: the reward model's tokenizer.
        stop_ids: the base's tokens that end an answer; they become `end_id`.
        end_id: what follows an answer that the reward model reads; None: nothing.
    """

    base: Any
    own: Any
    stop_ids: frozenset[int]
    end_id: int | None

    def encode(self, answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """The reward model's tokens of every answer; an incomplete character at the end is left out."""
        ended = [bool(answer) and answer[-1] in self.stop_ids for answer in answers]
        bodies = [list(answer[:-1]) if end else list(answer) for answer, end in zip(answers, ended, strict=True)]
        texts = self.base.batch_decode(bodies, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        encoded = self.own([text.rstrip("\ufffd") for text in texts], add_special_tokens=False)["input_ids"]
        mark = [] if self.end_id is None else [self.end_id]
        return [[*ids, *mark] if end else list(ids) for ids, end in zip(encoded, ended, strict=True)]
