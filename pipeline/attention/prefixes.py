"""Which cache row holds the keys of which prompt, so that a prompt that is there already is copied, not computed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

Row = TypeVar("Row", bound=Hashable)


class Key(NamedTuple):
    """A prompt, or the shared prefix of one (`shared` 0), by which rows are found.

    Equal keys have equal bits in the cache: `weights` are those of a role whose output depends on them.
    """

    adapter: str | None
    shared: int
    tokens: tuple[int, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids for one role.

    The last token is not part of what is held: it is computed with the row's first step.

    Args:
        adapter: of the role.
        tokens: the prompt.
        shared: how many first tokens other prompts of the role may begin with as well.
        weights: the row's preference weights, where the role's output depends on them.
    """

    adapter: str | None
    tokens: tuple[int, ...]
    shared: int
    weights: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, adapter: str | None, tokens: Sequence[int], shared: int, *, weights: tuple[float, ...] = ()
    ) -> Prompt:
        """A prompt whose shared prefix leaves at least one token over."""
        return cls(adapter, tuple(tokens), min(shared, len(tokens) - 1), weights)

    @property
    def keys(self) -> tuple[Key, ...]:
        """What it can be found by, the longest first."""
        whole = Key(self.adapter, self.shared, self.tokens[:-1], self.weights)
        if not self.shared:
            return (whole,)
        return whole, Key(self.adapter, 0, self.tokens[: self.shared], self.weights)

    def segments(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Tokens [start, stop), cut where the shared prefix ends.

        A segment's bits depend on where it ends: cut so, they depend on the prompt alone, not on what is shared now.
        """
        return list(pairwise([start, *([self.shared] if start < self.shared < stop else []), stop]))


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
