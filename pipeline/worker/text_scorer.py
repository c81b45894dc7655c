"""Log-probabilities of texts under a language model whose tokens are not the base's.

The score of a text is the logarithm of the probability that the model's text begins with it, by its usual tokens: all
of them but the last as they are, and in place of the last one every token that begins with its bytes. Bytes of an
incomplete character are continued likewise. A finished answer is scored token by token, its end included. What a
candidate adds to the score is its conditional log-probability (docs/mathematics.md, section 9).

T tokens of a reading, H the width of the hidden states, P places in it, V vocabulary, N texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.attention.branches import Branch, Reading
from pipeline.hub.token_bytes import ByteIndex
from pipeline.worker.branch_rows import BranchRow, Text, num_shared
from pipeline.worker.whole_vectors import WholeVectors

KeyT = TypeVar("KeyT", bound=Hashable)
Head = Callable[[Tensor, int], Tensor]  # hidden states [P, H] and an adapter's number to logits [P, V] in float32


class TextScorer:
    """Scores texts by their log-probability (`Scorer`).

    Args:
        head: from hidden states and the number of their adapter to logits.
        index: the bytes of the model's tokens.
        device: where the model is.
    """

    def __init__(self, head: Head, index: ByteIndex, device: torch.device) -> None:
        self._head = head
        self._index = index
        self._ids = torch.tensor(index.ids, device=device)

    def request(self, row: BranchRow, prefix: Text, texts: Sequence[Text]) -> TextRequest:
        """What has to be read; the row keeps the tokens of `prefix`, and knows the log-probability of each."""
        start, trunk = len(row.prompt.tokens), prefix.tokens
        parts = [self._parts(text, start) for text in texts]
        forks = [num_shared(trunk, each.tokens) for each in parts]
        shared = num_shared(row.cache.tokens, trunk)
        # logits are needed of the token before each one that is new; those of cached tokens are gone
        first = [each.first_place(fork) for each, fork in zip(parts, forks, strict=True)]
        kept = min([shared, *first, *([shared - 1] if shared >= start else [])])
        branches: list[Branch] = []
        offsets: list[int] = []
        count = len(trunk) - kept
        for each, fork in zip(parts, forks, strict=True):
            tokens = each.tokens[fork : each.last_place + 1]
            offsets.append(count - fork)
            if tokens:
                branches.append(Branch(fork, tokens))
                count += len(tokens)
        places = [_Places(each, fork, kept, offset) for each, fork, offset in zip(parts, forks, offsets, strict=True)]
        return TextRequest(row, Reading(row.cache, kept, trunk[kept:], branches), places, self)

    def _parts(self, text: Text, start: int) -> _Parts:
        """The parts of a text. Bytes that no token begins with are tokens of one byte each, the last one open."""
        parts = _Parts.of(text, start, self._index.by_id)
        if not parts.pending or self._has(parts.pending) or (parts.last and self._has(parts.last + parts.pending)):
            return parts
        *before, last = (parts.pending[at : at + 1] for at in range(len(parts.pending)))
        ids = [self._index.one_byte.get(each) for each in before]
        if None in ids or not self._has(last):  # it has no such tokens: the bytes count with their character
            return replace(parts, pending=b"")
        tokens = [*parts.tokens, *(token for token in ids if token is not None)]
        return _Parts(tokens, start, len(tokens), None, last)

    def _has(self, start: bytes) -> bool:
        first, stop = self._index.beginning_with(start)
        return first < stop

    def logits(self, states_PH: Tensor, adapter: int) -> Tensor:
        """Logits [P, V] of the tokens at some places; those of a place do not depend on how many others there are."""
        with WholeVectors():
            return self._head(states_PH, adapter)

    def bounds(self, start: bytes) -> tuple[int, int]:
        """The tokens that begin with some bytes, for `ids`."""
        return self._index.beginning_with(start)

    def ids(self, bounds: tuple[int, int]) -> Tensor:
        """Token ids by bounds."""
        return self._ids[bounds[0] : bounds[1]]


@dataclass(frozen=True, slots=True)
class _Parts:
    """A text as its score needs it.

    Args:
        tokens: prompt and answer.
        start: where the answer begins.
        num_closed: tokens, the prompt's included, that count as they are.
        last: bytes of the token behind those, in place of which any that begins with them counts; None: none is.
        pending: bytes of an incomplete character behind the tokens.
    """

    tokens: list[int]
    start: int
    num_closed: int
    last: bytes | None
    pending: bytes

    @classmethod
    def of(cls, text: Text, start: int, bytes_by_id: Sequence[bytes | None]) -> _Parts:
        tokens = text.tokens
        last = None
        if len(tokens) > start and not text.is_ended and tokens[-1] < len(bytes_by_id):
            last = bytes_by_id[tokens[-1]]
        return cls(tokens, start, len(tokens) - (last is not None), last, text.pending)

    @property
    def last_place(self) -> int:
        """The last token whose logits are needed."""
        return len(self.tokens) - (1 if self.pending else 2)

    def first_place(self, fork: int) -> int:
        """The first token whose logits are needed, where those before `fork` are known."""
        needed = [len(self.tokens)]
        if fork < self.num_closed:
            needed.append(fork - 1)
        if self.last is not None:
            needed.append(len(self.tokens) - 2)
        if self.pending:
            needed.append(len(self.tokens) - 1)
            if self.last is not None:  # the last token also counts as it is
                needed.append(len(self.tokens) - 2)
        return min(needed)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a text's tokens are in a reading: those before the fork in its trunk, the others in a branch.

    Args:
        parts: the text.
        fork: the first token that is not the trunk's.
        kept: the first token of the trunk in the reading.
        offset: the place of a branch's token less its number.
    """

    parts: _Parts
    fork: int
    kept: int
    offset: int

    def of(self, token: int) -> int:
        """The place of a token by its number."""
        return token - self.kept if token < self.fork else token + self.offset


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Texts of a row that are to be scored (`ScoringRequest`).

    Args:
        row: the row; it knows the log-probability of each cached token of its answer.
        reading: what is read.
        texts: where each text's tokens are in it.
        scorer: knows the head and the vocabulary.
    """

    row: BranchRow
    reading: Reading
    texts: Sequence[_Places]
    scorer: TextScorer

    def finish(self, states_TH: Tensor) -> Tensor:
        """The score [N] of each text in nats, in float64."""
        asked = _Asked(self.scorer)
        trunk = self._ask_for_trunk(asked)
        waiting = [self._ask(each, asked) for each in self.texts]
        found = asked.answers(states_TH, self.row.adapter)
        known = self._known(trunk, found)
        self.row.known = known
        start = len(self.row.prompt.tokens)
        scores = [_score(each, known[start : min(each.place.fork, each.closed_until)], found) for each in waiting]
        return torch.tensor(scores, dtype=torch.float64, device=states_TH.device)

    def _ask_for_trunk(self, asked: _Asked) -> list[int]:
        """Ask for the log-probability of each new token of the trunk's answer."""
        start = max(self.reading.kept + 1, len(self.row.prompt.tokens))
        trunk, kept = self.reading.trunk, self.reading.kept
        return [asked.token(at - 1 - kept, trunk[at - kept]) for at in range(start, kept + len(trunk))]

    def _known(self, trunk: Sequence[int], found: Sequence[float]) -> list[float]:
        """The log-probability of each token of the row's answer, with zeros for its prompt."""
        start = max(self.reading.kept + 1, len(self.row.prompt.tokens))
        before = list(self.row.known or ())[:start]
        before += [0.0] * (min(start, self.reading.kept + len(self.reading.trunk)) - len(before))
        return [*before, *(found[at] for at in trunk)]

    def _ask(self, place: _Places, asked: _Asked) -> _Waiting:
        parts, count = place.parts, len(place.parts.tokens)
        closed = [
            asked.token(place.of(at - 1), parts.tokens[at])
            for at in range(max(place.fork, parts.start), parts.num_closed)
        ]
        if not parts.pending:
            last = None if parts.last is None else asked.beginning_with(place.of(count - 2), parts.last)
            return _Waiting(place, parts.num_closed, closed, last)
        longer = whole = None
        if parts.last is not None:
            longer = asked.beginning_with(place.of(count - 2), parts.last + parts.pending)
            whole = asked.token(place.of(count - 2), parts.tokens[-1])
        after = asked.beginning_with(place.of(count - 1), parts.pending)
        return _Waiting(place, parts.num_closed, closed, longer, whole, after, has_pending=True)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A text whose numbers were asked for; by their places among the answers.

    Args:
        place: the text.
        closed_until: tokens that count as they are.
        closed: the log-probabilities of those behind the fork.
        last: what counts in place of the last token; None: nothing.
        whole: the last token itself, before the bytes of an incomplete character.
        after: what begins with those bytes behind it.
        has_pending: whether there are such bytes.
    """

    place: _Places
    closed_until: int
    closed: Sequence[int]
    last: int | None
    whole: int | None = None
    after: int | None = None
    has_pending: bool = False


def _score(text: _Waiting, known: Sequence[float], found: Sequence[float]) -> float:
    total = math.fsum([*known, *(found[at] for at in text.closed)])
    if not text.has_pending:
        return total if text.last is None else total + found[text.last]
    ways = [] if text.last is None else [found[text.last]]
    if text.after is not None:
        ways.append(found[text.after] + (0.0 if text.whole is None else found[text.whole]))
    highest = max(ways)
    return total + highest + math.log(math.fsum(math.exp(way - highest) for way in ways))


class _Asked:
    """Log-probabilities at places of a reading, collected so that one transfer brings all of them.

    Args:
        scorer: knows the head and the vocabulary.
    """

    def __init__(self, scorer: TextScorer) -> None:
        self._scorer = scorer
        self._tokens: dict[tuple[int, int], int] = {}
        self._ranges: dict[tuple[int, tuple[int, int]], int] = {}
        self._count = 0

    def token(self, place: int, token: int) -> int:
        """Ask for a token's log-probability after a place; the number of the answer."""
        return self._number(self._tokens, (place, token))

    def beginning_with(self, place: int, start: bytes) -> int | None:
        """Ask for the log-probability of all tokens that begin with some bytes; None where there are none."""
        bounds = self._scorer.bounds(start)
        return None if bounds[0] == bounds[1] else self._number(self._ranges, (place, bounds))

    def _number(self, asked: dict[KeyT, int], key: KeyT) -> int:
        if key not in asked:
            asked[key] = self._count
            self._count += 1
        return asked[key]

    def answers(self, states_TH: Tensor, adapter: int) -> list[float]:
        """All answers by number, in nats."""
        if not self._count:
            return []
        at = sorted({place for place, _ in (*self._tokens, *self._ranges)})
        row_of = {place: row for row, place in enumerate(at)}
        logits_PV = self._scorer.logits(states_TH[torch.tensor(at, device=states_TH.device)], adapter)
        normaliser_P = logits_PV.logsumexp(-1)
        found: list[Tensor | None] = [None] * self._count
        for (place, token), number in self._tokens.items():
            row = row_of[place]
            found[number] = logits_PV[row, token] - normaliser_P[row]
        for (place, bounds), number in self._ranges.items():
            row = row_of[place]
            found[number] = logits_PV[row, self._scorer.ids(bounds)].logsumexp(-1) - normaliser_P[row]
        return torch.stack([each for each in found if each is not None]).double().tolist()
