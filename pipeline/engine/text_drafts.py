"""Proposals from texts: the row's own, its existing answer, other answers to its prompt.

Each source is compared with every token that is drawn, whether its proposals were verified or not. So how often it is
right is known, by how long a suffix it has matched, before anything is spent on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.config.drafts import DraftSource
from pipeline.engine.guesses import Guess, Proposal, Rates
from pipeline.engine.passages import Match, Passages
from pipeline.engine.row_state import RunningRow
from pipeline.errors import RowError
from pipeline.protocol.messages import MOST_DRAFTED

KNOWN_LENGTHS = 8  # of a matched suffix; longer ones are as good
KEPT_PROMPTS = 256  # whose answers are remembered


@dataclass(slots=True)
class RowTexts:
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
    found: dict[DraftSource, Sequence[Proposal]] = field(default_factory=dict)


class TextDrafts:
    """The texts of running rows, and what they propose.

    Args:
        sources: in the order of preference among equally likely ones; those that are no texts are left out.
        encode_existing: the token ids of a row's existing answer. May raise RowError.
        rates: learned from what rows draw.
    """

    def __init__(
        self, sources: Sequence[DraftSource], encode_existing: Callable[[RunningRow], Sequence[int]], rates: Rates
    ) -> None:
        self._sources = tuple(source for source in sources if source is not DraftSource.MODEL)
        self._encode_existing = encode_existing
        self._rates = rates
        self._texts: dict[tuple[str, int, int], RowTexts] = {}
        self._siblings: OrderedDict[str, Passages] = OrderedDict()

    def guess(self, running: RunningRow, most: int) -> Guess | None:
        """The likeliest proposal of all texts, of at most `most` tokens."""
        texts, best = self.read(running), None
        for source, (passages, _) in texts.passages.items():
            text = texts.text if source is DraftSource.LOOKUP else running.tokens
            match = passages.find(text, MOST_DRAFTED)
            if match is None:
                texts.found.pop(source, None)
                continue
            texts.found[source] = proposals = _proposals(running, source, match)
            chance = self._rates.of(proposals[0].keys[0])
            if best is None or chance > best[0]:
                best = chance, source, proposals
        return None if best is None else Guess.of(best[1], best[2][:most], self._rates)

    def read(self, running: RunningRow) -> RowTexts:
        """The texts of a row with all its tokens; those that are new show how good the last proposals were."""
        texts = self._texts.get(running.key)
        if texts is None or texts.num_seen > len(running.tokens):  # it began again
            texts = self._texts[running.key] = self._begin(running)
        new = running.tokens[texts.num_seen :]
        if not new:
            return texts
        for proposals in texts.found.values():
            for token, proposal in zip(new, proposals, strict=False):
                for key in proposal.keys:
                    self._rates.note(key, is_hit=token == proposal.token)
                if token != proposal.token:
                    break
        texts.found.clear()
        for passages, number in texts.passages.values():
            if number is not None:
                passages.extend(number, new)
        texts.text += new
        texts.num_seen += len(new)
        return texts

    def end(self, running: RunningRow) -> None:
        """Remember a row that has ended as the sibling of others alone."""
        if running.key in self._texts:
            self.read(running)
            del self._texts[running.key]

    def _begin(self, running: RunningRow) -> RowTexts:
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
        return RowTexts(passages, prompt)


def _proposals(running: RunningRow, source: DraftSource, match: Match) -> list[Proposal]:
    return [
        Proposal(token, ((running.variant, source, min(match.length + at, KNOWN_LENGTHS)),))
        for at, token in enumerate(match.tokens)
    ]
