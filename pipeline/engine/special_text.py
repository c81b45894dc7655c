"""Encodes text so that special tokens spelled in it stay text: only a chat template may write the tokens.

What a user writes, such as `<|im_end|>`, would otherwise end a turn. Where a message spells a special token, the
place is marked before the template is rendered, and the marked pieces are encoded apart. All other text is encoded
as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from pipeline.errors import RowError
from pipeline.hub.answer_starts import NEWLINE, without_start

# Unicode has these two for the inside of programs; no text contains them
START, END = "\ufdd0", "\ufdd1"
LETTER = "a"  # a text, to see what a tokenizer puts around one
PIECES = re.compile(f"{START}([^{START}{END}]*){END}|[{START}{END}]")


class TextEncoder:
    """Encodes text and rendered conversations.

    Args:
        tokenizer: of transformers.
        special_tokens: tokens, as text, that stay text where a message spells them.
    """

    def __init__(self, tokenizer: Any, special_tokens: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, value: Any) -> Any:
        """The value with a mark around every special token in its strings; itself where there is none."""
        if isinstance(value, str):
            return self._spelled.sub(f"{START}\\g<0>{END}", value) if self._spelled.search(value) else value
        if isinstance(value, list):
            return [self.mark(each) for each in value]
        if isinstance(value, dict):
            return {key: self.mark(each) for key, each in value.items()}
        return value

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a rendered conversation; what `mark` marked is encoded as text. Raises RowError."""
        first, *rest = PIECES.split(text)
        ids = self._ids(first)
        for at, piece in enumerate(rest):
            if piece:
                ids += self._inner(piece, spelled=at % 2 == 0)
        return ids

    def encode_text(self, text: str, *, starts: bool = False, follows: bool = False) -> list[int]:
        """Token ids of text without a template.

        Args:
            text: to be encoded.
            starts: adds what the tokenizer begins a text with.
            follows: leaves out the space that some tokenizers put before a text.

        Raises:
            RowError: the tokenizer cannot read a special token as text.
        """
        if follows:
            return self._inner(text, spelled=self._spelled.search(text) is not None)
        if not self._spelled.search(text):
            return self._ids(text, starts=starts)
        return self._as_text(text, starts=starts)

    def _inner(self, piece: str, *, spelled: bool) -> list[int]:
        """A piece from within a text, encoded after a line break so that no tokenizer begins it as a text."""
        encode = self._as_text if spelled else self._ids
        ids = without_start(self._ids(NEWLINE), encode(NEWLINE + piece))
        return encode(piece) if ids is None else ids

    def _as_text(self, text: str, *, starts: bool = False) -> list[int]:
        ids = self._ids(text, starts=starts, split_special_tokens=True)
        spelled = sorted({*self._spelled.findall(text)})
        begun = len(self._start) if starts else 0
        if kept := [token for token in spelled if self._tokenizer.convert_tokens_to_ids(token) in ids[begun:]]:
            raise RowError(
                f"the tokenizer cannot read {', '.join(map(repr, kept))} as text; set input.allow_special_tokens to "
                "read it as a special token"
            )
        return ids

    def _ids(self, text: str, *, starts: bool = False, **options: Any) -> list[int]:
        ids = list(self._tokenizer(text, add_special_tokens=False, **options)["input_ids"])
        return [*self._start, *ids] if starts else ids

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text. What it puts behind one would end the prompt."""
        ids, whole = self._ids(LETTER), list(self._tokenizer(LETTER)["input_ids"])
        found = (at for at in range(len(whole)) if whole[at : at + len(ids)] == ids)
        return whole[: next(found, 0)]
