"""Prefix reuse: which cache row holds which prompt, so that a prompt that is cached is copied, not computed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

Row = TypeVar("Row", bound=Hashable)


class Key(NamedTuple):
    """A prompt, or the shared prefix of one, by which cache rows are found. Equal keys have equal bits in the cache.

    Args:
        adapter: of the role; None where it has none.
        shared: where the prompt was cut when it was computed; 0 for a shared prefix itself.
        tokens: the token ids that are cached.
        weights: the row's preference weights, for a role whose output depends on them.
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

        A segment's bits depend on where it begins and ends, as kernels add in another order for another length.
        Every prompt is therefore cut where its shared prefix ends, also while no other row shares it: whether the
        prefix is computed or copied then makes no difference to the row's bits.
        """
        return list(pairwise([start, *([self.shared] if start < self.shared < stop else []), stop]))


class Prefixes(Generic[Row]):
    """The prompts that cache rows hold. A row is named by anything hashable.

    Where several rows hold a prompt they hold the same bits, so it does not matter which one is copied.
    """

    def __init__(self) -> None:
        self._held: dict[Row, Prompt] = {}
        self._rows: dict[Key, dict[Row, None]] = {}

    def clear(self) -> None:
        """Forget all rows."""
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
        """A row that holds the longest cached part of the prompt, and that part's length.

        Args:
            prompt: what is looked for.
            preferred: the row that is returned where several hold the same part, and with length 0 where none does.
        """
        for key in prompt.keys:
            rows = self._rows.get(key)
            if rows:
                return (preferred if preferred in rows else next(reversed(rows))), len(key.tokens)
        return preferred, 0
