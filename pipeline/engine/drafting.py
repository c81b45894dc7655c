"""Drafts: tokens that a row may draw next, proposed before it draws them and verified in one pass.

A row's draw at a step is keyed, so a proposed token is right exactly if that draw yields it: what a row gets is the
same with any proposals and without. What they change is how many passes it takes.

Proposals come from texts: the row's own, its existing answer, other answers to its prompt. Each source is compared
with every token that is drawn, whether its proposals were verified or not. So how often it is right is known, by how
long a suffix it has matched, before anything is spent on it.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.config.drafts import DraftSource
from pipeline.engine.pace import Pace
from pipeline.engine.passages import Match, Passages
from pipeline.engine.row_state import RunningRow
from pipeline.errors import RowError
from pipeline.protocol.messages import MOST_DRAFTED

if TYPE_CHECKING:
    from pipeline.engine.scheduler import Call, Group

KNOWN_LENGTHS = 8  # of a matched suffix; longer ones are as good
PROBED_CHANCE = 0.5  # of a first token, with which it pays to learn what a pass costs
LEAST_PROBE = 4  # tokens
KEPT_PROMPTS = 256  # whose answers are remembered
UNSEEN_STEPS = 16  # that are sent ahead one after another
FADES_AT = 256  # proposals, after which earlier ones count half

Key = tuple[int, DraftSource, int]


@dataclass(slots=True)
class Tally:
    """Proposed tokens and drafts of one source.

    Args:
        drafted: tokens that passes verified.
        accepted: tokens among them that were drawn.
    """

    drafted: int = 0
    accepted: int = 0


class Rates:
    """How often a proposed token is drawn, by variant, source and length of the suffix that matched."""

    def __init__(self) -> None:
        self._counts: dict[Key, list[float]] = defaultdict(lambda: [1.0, 2.0])

    def note(self, key: Key, *, is_hit: bool) -> None:
        """Count a proposal."""
        counts = self._counts[key]
        counts[0] += is_hit
        counts[1] += 1
        if counts[1] > FADES_AT:
            counts[:] = counts[0] / 2, counts[1] / 2

    def of(self, key: Key) -> float:
        """The share of such proposals that were drawn."""
        hits, count = self._counts[key]
        return hits / count


@dataclass(slots=True)
class _Texts:
    """What a row's proposals come from.

    Args:
        passages: by source, with the number of the sequence that takes the row's tokens; None: none does.
        text: the row's prompt and its tokens.
        num_seen: tokens of the row that these have.
        found: by source, what was proposed last.
    """

    passages: Mapping[DraftSource, tuple[Passages, int | None]]
    text: list[int]
    num_seen: int = 0
    found: dict[DraftSource, Match] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Guess:
    """What a row may draw next.

    Args:
        source: that it is from.
        tokens: proposed.
        chances: that the tokens up to each one are all drawn.
    """

    source: DraftSource
    tokens: Sequence[int]
    chances: Sequence[float]

    def first(self, count: int) -> Guess:
        """Its first `count` tokens."""
        return Guess(self.source, self.tokens[:count], self.chances[:count])


class Drafter:
    """Proposes tokens for the rows of an engine.

    Args:
        sources: in the order of preference among equally likely ones.
        encode_existing: the token ids of a row's existing answer. May raise RowError.
        pace: what passes cost; None: it is learned.

    Attributes:
        tallies: by source, what was verified so far.
    """

    def __init__(
        self,
        sources: Sequence[DraftSource],
        encode_existing: Callable[[RunningRow], Sequence[int]],
        pace: Pace | None = None,
    ) -> None:
        self.tallies: dict[DraftSource, Tally] = {source: Tally() for source in sources}
        self._sources = tuple(sources)
        self._encode_existing = encode_existing
        self._pace = Pace() if pace is None else pace
        self._rates = Rates()
        self._texts: dict[tuple[str, int, int], _Texts] = {}
        self._siblings: OrderedDict[str, Passages] = OrderedDict()
        self._completed_s = 0.0

    def wants_tokens(self, group: Group) -> bool:
        """Whether the next step is to wait for the pending tokens, where others are sent ahead.

        It does after a step with a draft; otherwise now and then, to see whether a draft would pay.
        """
        return group.num_undrafted % UNSEEN_STEPS == 0

    def draft(self, group: Group) -> None:
        """Choose the drafts of a group's next step, as many as it has lanes for.

        The likeliest tokens come first, as long as each makes tokens cheaper.
        """
        slots = group.drawing
        guesses = {slot: guess for slot in slots if (guess := self._guess(group.running[slot])) is not None}
        counts, expected, num_positions = dict.fromkeys(guesses, 0), float(len(slots)), len(slots)
        order = [(-guess.chances[0], slot) for slot, guess in guesses.items()]
        heapq.heapify(order)
        most, is_probe = len(group.lanes), False
        if order and -order[0][0] >= PROBED_CHANCE and not group.parts and self._pace.begins_probe():
            most, is_probe = min(most, max(len(slots), LEAST_PROBE)), True
        while order and num_positions - len(slots) < most:
            negative, slot = heapq.heappop(order)
            if not is_probe and not self._pace.is_worth(-negative, expected, num_positions):
                break
            counts[slot], expected, num_positions = counts[slot] + 1, expected - negative, num_positions + 1
            if counts[slot] < len(chances := guesses[slot].chances):
                heapq.heappush(order, (-chances[counts[slot]], slot))
        group.guesses = {slot: guesses[slot].first(count) for slot, count in counts.items() if count}
        group.num_undrafted = 0 if group.guesses else group.num_undrafted + 1

    def completed(self, call: Call) -> None:
        """Learn what a step took whose outcomes have arrived: from the one before, where that was later."""
        began_s, self._completed_s = max(call.sent_s, self._completed_s), time.monotonic()
        if call.slots and not call.has_prompts:
            self._pace.note(call.num_positions, self._completed_s - began_s)

    def verified(self, running: RunningRow, guess: Guess | None, *, has_ended: bool) -> None:
        """Count what was drawn of a draft; a row that has ended is remembered as the sibling of others alone."""
        if guess is not None:
            tally = self.tallies[guess.source]
            tally.drafted += len(guess.tokens)
            tally.accepted += running.num_accepted
        if has_ended and running.key in self._texts:
            self._read(running)
            del self._texts[running.key]

    def _guess(self, running: RunningRow) -> Guess | None:
        """The likeliest proposal of all sources."""
        most = min(MOST_DRAFTED, running.max_tokens - len(running.tokens) - running.num_pending - 1)
        if not running.can_be_drafted or most < 1:
            return None
        texts, best = self._read(running), None
        for source, (passages, _) in texts.passages.items():
            text = texts.text if source is DraftSource.LOOKUP else running.tokens
            match = passages.find(text, MOST_DRAFTED)
            if match is None:
                texts.found.pop(source, None)
                continue
            texts.found[source] = match
            chance = self._rates.of(self._key(running, source, match, 0))
            if best is None or chance > best[0]:
                best = chance, source, match
        if best is None:
            return None
        _, source, match = best
        chances, chance = [], 1.0
        for at in range(min(most, len(match.tokens))):
            chance *= self._rates.of(self._key(running, source, match, at))
            chances.append(chance)
        return Guess(source, match.tokens[: len(chances)], chances)

    def _read(self, running: RunningRow) -> _Texts:
        """The texts of a row with all its tokens; those that are new show how good the last proposals were."""
        texts = self._texts.get(running.key)
        if texts is None or texts.num_seen > len(running.tokens):  # it began again
            texts = self._texts[running.key] = self._begin(running)
        new = running.tokens[texts.num_seen :]
        if not new:
            return texts
        for source, match in texts.found.items():
            for at, (token, proposed) in enumerate(zip(new, match.tokens, strict=False)):
                self._rates.note(self._key(running, source, match, at), is_hit=token == proposed)
                if token != proposed:
                    break
        texts.found.clear()
        for passages, number in texts.passages.values():
            if number is not None:
                passages.extend(number, new)
        texts.text += new
        texts.num_seen += len(new)
        return texts

    def _begin(self, running: RunningRow) -> _Texts:
        prompt = list(next(iter(running.prompts.values())))
        passages: dict[DraftSource, tuple[Passages, int | None]] = {}
        for source in self._sources:
            if source is DraftSource.LOOKUP:
                own = Passages()
                own.extend(number := own.begin(), prompt)
                passages[source] = own, number
            elif source is DraftSource.SIBLINGS:
                others = self._siblings.setdefault(running.row.row_id, Passages())
                self._siblings.move_to_end(running.row.row_id)
                passages[source] = others, others.begin()
            elif running.row.response is not None:
                existing = Passages()
                with suppress(RowError):  # a model cannot read it
                    existing.extend(existing.begin(), self._encode_existing(running))
                passages[source] = existing, None
        while len(self._siblings) > KEPT_PROMPTS:
            self._siblings.popitem(last=False)
        return _Texts(passages, prompt)

    @staticmethod
    def _key(running: RunningRow, source: DraftSource, match: Match, at: int) -> Key:
        return running.variant, source, min(match.length + at, KNOWN_LENGTHS)
