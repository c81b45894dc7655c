"""Passages: token sequences, and where a text goes on in them after its longest matching suffix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LONGEST = 16  # tokens of a suffix that are compared
PLACES = 16  # of one pair of tokens, the newest
START = -2  # stands before the first token of an answer: beginnings match as well


class Match(NamedTuple):
    """How a text may go on.

    Args:
        tokens: what follows its suffix elsewhere.
        length: tokens of the suffix, at most LONGEST.
    """

    tokens: list[int]
    length: int


class Passages:
    """Sequences that grow. A suffix is found by its last two tokens, then compared backwards."""

    def __init__(self) -> None:
        self._sequences: list[list[int]] = []
        # by pair of tokens, the places behind it: number of the sequence, index of the next token. Most pairs have
        # one place: a list takes 280 bytes a token then, a deque 950
        self._places: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)

    def begin(self) -> int:
        """Begin a sequence; returns its number."""
        self._sequences.append([START])
        self.append(len(self._sequences) - 1, START)
        return len(self._sequences) - 1

    def append(self, number: int, token: int) -> None:
        """Append a token to a sequence."""
        sequence = self._sequences[number]
        sequence.append(token)
        places = self._places[sequence[-2], token]
        places.append((number, len(sequence)))
        if len(places) > PLACES:
            del places[0]

    def extend(self, number: int, tokens: Iterable[int]) -> None:
        """Append tokens to a sequence."""
        for token in tokens:
            self.append(number, token)

    def find(self, text: Sequence[int], count: int) -> Match | None:
        """What follows the longest suffix of `text` that a sequence has, up to `count` tokens; None: nothing does.

        A suffix has at least two tokens; START stands before the text's first one. The newest of equals is taken.
        """
        tail = [START, START, *text] if len(text) < LONGEST else text
        best, length = None, 0
        for number, at in reversed(self._places.get((tail[-2], tail[-1]), ())):
            sequence = self._sequences[number]
            if at < len(sequence) and (same := _same(sequence, at, tail)) > length:
                best, length = sequence[at : at + count], same
        return None if best is None else Match(best, length)


def _same(sequence: Sequence[int], at: int, tail: Sequence[int]) -> int:
    """Tokens before `at` that are those at the end of `tail`."""
    most = min(LONGEST, at, len(tail))
    return next((count for count in range(most) if sequence[at - 1 - count] != tail[-1 - count]), most)
