"""Proposals of a model: one small pass for the next token of several rows, then another for the one behind it.

Unlike a text, a model costs something whenever it is asked. So it is asked as long as the tokens that it is likely to
give are worth its passes and their places in the base's pass, by what both were measured to take. Where it is not
worth that, it is asked about few tokens now and then, for a small share of the time, in case that changes.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config.drafts import DraftSource
from pipeline.engine.guesses import FADES_AT, Guess, Key, Proposal, Rates
from pipeline.engine.pace import Pace
from pipeline.engine.row_state import RunningRow
from pipeline.errors import HostOutOfMemory
from pipeline.protocol.drafts import OF_MODEL, DraftingModel, DraftRequest
from pipeline.quoting import one_line

LEVELS = 8  # of the probability that the model gives a token
ANY_LEVEL = -1
HOPEFUL = 0.5  # chance that all proposed tokens are drawn, with which a trial goes on to the next one
TRIED = 4  # tokens
TRIAL_SHARE = 0.01  # of the time, for trials
FIRST_PASSES = 2  # of the base, whose time trials may take before that


@dataclass(slots=True)
class Asked:
    """A row that the model may be asked about.

    Args:
        slot: of the row.
        running: the row.
        text: its prompt and its tokens; the row's own list, which nobody changes meanwhile.
        most: tokens to propose.
        chance: that all proposed so far are drawn.
        proposals: so far.
    """

    slot: int
    running: RunningRow
    text: Sequence[int]
    most: int
    chance: float = 1.0
    proposals: list[Proposal] = field(default_factory=list)

    @property
    def any_key(self) -> Key:
        """What its next proposal is counted among, whatever its probability."""
        return self.running.variant, DraftSource.MODEL, ANY_LEVEL


class ModelDrafts:
    """Asks the model.

    Args:
        model: proposes tokens.
        rates: how often proposals were drawn.
        pace: what passes of the base cost.
        draw: temperature and top_p of rows that have no other.

    Attributes:
        is_off: whether the model is given up.
    """

    def __init__(self, model: DraftingModel, rates: Rates, pace: Pace, draw: tuple[float, float]) -> None:
        self.model = model
        self.spent_s = 0.0  # by the step that is being drafted
        self.is_off = False
        self._rates, self._pace, self._draw = rates, pace, draw
        self._own_pace = Pace()
        self._trials_s = self._passes_s = 0.0
        self._reading_s, self._num_tokens_read = 0.0, 0
        self._num_ended, self._tokens_of_ended = 0, 0
        self._read: set[tuple[str, int, int]] = set()
        # by variant, the proposals of each level
        self._levels: dict[int, list[float]] = defaultdict(lambda: [0.0] * LEVELS)

    def resize(self, num_slots: int) -> None:
        """Have the model hold `num_slots` rows from now on; one that is given up holds none."""
        self._read.clear()
        self.model.resize(0 if self.is_off else num_slots)

    def completed(self, seconds: float) -> None:
        """Count the seconds of a step."""
        self._passes_s += seconds

    def end(self, running: RunningRow) -> None:
        """Forget a row that has ended."""
        self._num_ended += 1
        self._tokens_of_ended += len(running.tokens)
        self._read.discard(running.key)

    def guess(
        self, rows: Sequence[Asked], *, num_rows: int, most: int, may_try: bool, wait_s: float = 0.0
    ) -> Mapping[int, Guess]:
        """What the rows may draw next, by slot.

        Args:
            rows: that it may be asked about.
            num_rows: all that the step advances.
            most: tokens, over all rows.
            may_try: whether tokens may be asked for that are not worth it.
            wait_s: seconds that a step takes longer with any draft than without.
        """
        self.spent_s, num_tokens, expected, left = 0.0, 0, float(num_rows), list(rows)
        is_trial = False
        while left and num_tokens < most and not self.is_off:
            left.sort(key=lambda each: -each.chance * self._rates.of(each.any_key))
            count = self._how_many(left, expected, num_rows + num_tokens, 0.0 if num_tokens else wait_s)
            if not count and not num_tokens and may_try and self._may_try(num_rows):
                is_trial = True
                left.sort(key=lambda each: each.running.key not in self._read)  # whose texts are read already
            if is_trial:
                left = [each for each in left if each.chance >= HOPEFUL]
                count = TRIED - num_tokens
            chosen = left[: min(count, most - num_tokens)]
            if not chosen:
                break
            expected += self._ask(chosen)
            num_tokens += len(chosen)
            left = [each for each in chosen if len(each.proposals) < each.most]
        if is_trial:
            self._trials_s += self.spent_s
        return {
            each.slot: Guess.of(DraftSource.MODEL, each.proposals, self._rates) for each in rows if each.proposals
        }

    def _how_many(self, ranked: Sequence[Asked], expected: float, num_positions: int, wait_s: float = 0.0) -> int:
        """The number of the likeliest rows that one more token each is worth its costs for, `wait_s` among them."""
        if not self._own_pace.is_begun:
            return 0
        outlooks = {
            variant: self._outlook(variant, expected, num_positions)
            for variant in dict.fromkeys(each.running.variant for each in ranked)
        }
        best, best_gain, tokens, num_more, reading_s = 0, 0.0, 0.0, 0.0, 0.0
        for count, each in enumerate(ranked, 1):
            drawn, verified = outlooks[each.running.variant]
            tokens, num_more = tokens + each.chance * drawn, num_more + verified
            reading_s += self._share_of_reading(each)
            own_s = self._own_pace.seconds(count) + reading_s + wait_s
            gain = self._pace.gain(tokens, num_more, expected, num_positions, spent_s=self.spent_s, extra_s=own_s)
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def _share_of_reading(self, asked: Asked) -> float:
        """The seconds that reading a row's text takes, where it is still to be read, for each step that is left.

        A row is taken to get as many tokens as those that have ended, and at least one more.
        """
        if asked.running.key in self._read or not self._num_tokens_read:
            return 0.0
        length = self._tokens_of_ended / self._num_ended if self._num_ended else asked.running.max_tokens
        num_left = max(1.0, min(length, asked.running.max_tokens) - len(asked.running.tokens))
        return len(asked.text) * self._reading_s / self._num_tokens_read / num_left

    def _outlook(self, variant: int, expected: float, num_positions: int) -> tuple[float, float]:
        """Of one proposal: the chance that it is verified and drawn, and the chance that it is verified.

        A pass verifies those alone whose level makes them likely enough.
        """
        drawn, verified, total = HOPEFUL, 1.0, 1.0  # as if one had been seen
        for level, number in enumerate(self._levels[variant]):
            chance = self._rates.of((variant, DraftSource.MODEL, level))
            total += number
            if self._pace.is_worth(chance, expected, num_positions, spent_s=self.spent_s):
                drawn, verified = drawn + number * chance, verified + number
        return drawn / total, verified / total

    def _count(self, variant: int, level: int) -> None:
        levels = self._levels[variant]
        levels[level] += 1
        if sum(levels) > FADES_AT:
            levels[:] = [number / 2 for number in levels]

    def _may_try(self, num_rows: int) -> bool:
        """Whether trials have taken so little time that another one is not felt."""
        if not self._pace.is_begun:
            return False
        return self._trials_s <= FIRST_PASSES * self._pace.seconds(num_rows) + TRIAL_SHARE * self._passes_s

    def _ask(self, rows: Sequence[Asked]) -> float:
        """Have the model propose one more token for each row; the tokens that these are expected to give."""
        requests = [
            DraftRequest(
                each.slot,
                [*each.text, *(proposal.token for proposal in each.proposals)],
                each.running.uniform(len(each.proposals)),
                each.running.step_terms.draw or self._draw,
            )
            for each in rows
        ]
        began_s = time.monotonic()
        try:
            found = self.model.propose(requests)
        except Exception as error:  # whatever it is: no answer depends on what the model proposes
            reason = str(error) if isinstance(error, HostOutOfMemory) else f"{OF_MODEL}: {one_line(error)}"
            warnings.warn(f"{reason}; it proposes nothing from now on", RuntimeWarning, stacklevel=2)
            self.is_off = True
            self.model.resize(0)
            return 0.0
        taken_s = time.monotonic() - began_s
        self.spent_s += taken_s
        unread = [each for each in rows if each.running.key not in self._read]
        if unread:
            self._reading_s += taken_s
            self._num_tokens_read += sum(len(each.text) for each in unread)
        else:
            self._own_pace.note(len(rows), taken_s)
        gained = 0.0
        for each, proposed in zip(rows, found, strict=True):
            self._read.add(each.running.key)
            if proposed is None:
                each.most = 0
                continue
            level = min(int(proposed.probability * LEVELS), LEVELS - 1)
            proposal = Proposal(proposed.token, ((each.running.variant, DraftSource.MODEL, level), each.any_key))
            self._count(each.running.variant, level)
            each.proposals.append(proposal)
            each.chance *= self._rates.of(proposal.keys[0])
            gained += each.chance
        return gained
