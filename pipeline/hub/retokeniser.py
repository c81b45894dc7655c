"""From one vocabulary to another: an answer of the base in the tokens of a model that has others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.hub.answer_starts import NEWLINE, without_start

TAIL = 64  # tokens at the end of an answer in which bytes that are no text are looked for
NO_TEXT = "".join(map(chr, range(0xDC80, 0xDD00)))  # what Python reads such bytes as


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """An answer as another model reads it.

    Args:
        ids: its tokens, the end of a finished answer included.
        is_ended: whether it is finished.
        pending: bytes at its end of a character that is not complete, or of none; no token stands for them.
    """

    ids: list[int]
    is_ended: bool
    pending: bytes


@dataclass(frozen=True, slots=True)
class Retokeniser:
    """Decodes an answer to text and tokenizes it with another model's tokenizer. Picklable.

    Args:
        base: the base's tokenizer.
        own: the other model's tokenizer.
        stop_ids: the base's tokens that end an answer; they become `end_id`.
        end_id: what follows an answer that the model reads; None: nothing.
        base_bytes: the bytes of each of the base's tokens, where an incomplete character counts.
        follows: whether its answers begin without the space that its tokenizer puts before a text.
    """

    base: Any
    own: Any
    stop_ids: frozenset[int]
    end_id: int | None
    base_bytes: Sequence[bytes | None] | None = None
    follows: bool = False

    def encode(self, answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """The model's tokens of every answer; an incomplete character at the end is left out."""
        ended = [self._is_ended(answer) for answer in answers]
        return self._encode(answers, ended, [True] * len(answers))

    def read(self, answers: Sequence[Sequence[int]]) -> list[ReadAnswer]:
        """The model's tokens of every answer, whether it has ended, and the bytes at its end that are no text."""
        ended = [self._is_ended(answer) or self._has_no_text(answer) for answer in answers]
        pending = [b"" if end else self._pending(answer) for answer, end in zip(answers, ended, strict=True)]
        encoded = self._encode(answers, ended, [each != b"" or self.base_bytes is None for each in pending])
        return [ReadAnswer(*each) for each in zip(encoded, ended, pending, strict=True)]

    def _encode(
        self, answers: Sequence[Sequence[int]], ended: Sequence[bool], strips: Sequence[bool]
    ) -> list[list[int]]:
        """The model's tokens of every answer; where it `strips`, without what stands for bytes that are no text."""
        bodies = [list(answer[:-1]) if end else list(answer) for answer, end in zip(answers, ended, strict=True)]
        texts = self.base.batch_decode(bodies, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts = [text.rstrip("\ufffd") if strip else text for text, strip in zip(texts, strips, strict=True)]
        # what an answer spells is text: it does not end here because it names a special token of the other model
        encoded = self._behind(texts) if self.follows else self._ids(texts)
        mark = [] if self.end_id is None else [self.end_id]
        return [[*ids, *mark] if end else list(ids) for ids, end in zip(encoded, ended, strict=True)]

    def _behind(self, texts: Sequence[str]) -> list[list[int]]:
        """The texts' tokens behind a line break; as texts of their own where that cannot be told apart from them."""
        [before, *whole] = self._ids([NEWLINE, *(NEWLINE + text for text in texts)])
        rests = [without_start(before, ids) for ids in whole]
        return [self._ids([text])[0] if rest is None else rest for text, rest in zip(texts, rests, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.own(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _is_ended(self, answer: Sequence[int]) -> bool:
        return bool(answer) and answer[-1] in self.stop_ids

    def _has_no_text(self, answer: Sequence[int]) -> bool:
        """Whether its last token is a special one, which no other model reads: it counts as an end."""
        return self.base_bytes is not None and bool(answer) and self.base_bytes[answer[-1]] is None

    def _pending(self, answer: Sequence[int]) -> bytes:
        """The bytes at the end that are no whole character, or none at all."""
        if self.base_bytes is None:
            return b""
        raw = b"".join(self.base_bytes[token] or b"" for token in answer[-TAIL:])
        text = raw.decode("utf-8", "surrogateescape")  # such a byte becomes a letter of its own
        num_pending = len(text) - len(text.rstrip(NO_TEXT))
        return raw[len(raw) - num_pending :]
