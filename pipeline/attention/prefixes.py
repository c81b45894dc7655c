"""Which cache row holds the keys of which prompt, so that a prompt that is there already is copied, not computed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

Row = TypeVar("Row", bound=Hashable)


class Key(NamedTuple):
    """A prompt, or the head of one (`head` 0), by which rows are found. Equal keys have equal bits in the cache."""

    adapter: str | None
    head: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids for one role. `head` counts those that other prompts of the role may begin with as well.

    The last token is not part of what is held: it is computed with the row's first step.
    """

    adapter: str | None
    tokens: tuple[int, ...]
    head: int

    @classmethod
    def of(cls, adapter: str | None, tokens: Sequence[int], head: int) -> Prompt:
        return cls(adapter, tuple(tokens), min(head, len(tokens) - 1))

    @property
    def keys(self) -> tuple[Key, ...]:
        """What it can be found by, the longest first."""
        whole = Key(self.adapter, self.head, self.tokens[:-1])
        return (whole, Key(self.adapter, 0, self.tokens[: self.head])) if self.head else (whole,)

    def segments(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Tokens [start, stop), its head apart: bits depend on where a segment ends, and so on the prompt alone."""
        return list(pairwise([start, *([self.head] if start < self.head < stop else []), stop]))


class Prefixes(Generic[Row]):
    """The prompts held by cache rows, whatever names them."""

    def __init__(self) -> None:
        self._held: dict[Row, Prompt] = {}
        self._rows: dict[Key, dict[Row, None]] = {}

    def clear(self) -> None:
        self._held.clear()
        self._rows.clear()

    def put(self, row: Row, prompt: Prompt) -> None:
        """Note that the row holds the prompt."""
        self.drop(row)
        self._held[row] = prompt
        for key in prompt.keys:
            self._rows.setdefault(key, {})[row] = None

    def drop(self, row: Row) -> None:
        """Forget what the row holds: it is about to be overwritten."""
        prompt = self._held.pop(row, None)
        for key in prompt.keys if prompt is not None else ():
            rows = self._rows[key]
            rows.pop(row, None)
            if not rows:
                del self._rows[key]

    def find(self, prompt: Prompt, *, preferred: Row) -> tuple[Row, int]:
        """A row that holds the longest part of the prompt that is held, and that part's length; (preferred, 0)
        where there is none. `preferred` is taken where several hold as much."""
        for key in prompt.keys:
            rows = self._rows.get(key)
            if rows:
                return (preferred if preferred in rows else next(reversed(rows))), len(key.tokens)
        return preferred, 0
