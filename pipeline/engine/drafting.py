"""Drafts: tokens that a row may draw next, proposed before it draws them and verified in one pass.

A row's draw at a step is keyed, so a proposed token is right exactly if that draw yields it: what a row gets is the
same with any proposals and without. What they change is how many passes it takes.

Proposals come from texts, which cost nothing, and from a model, which takes small passes of its own.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.config.drafts import DraftSource
from pipeline.engine.guesses import Guess, Rates, Tally
from pipeline.engine.lead import Lead
from pipeline.engine.model_drafts import Asked, ModelDrafts
from pipeline.engine.pace import Pace
from pipeline.engine.row_state import RunningRow
from pipeline.engine.text_drafts import TextDrafts
from pipeline.protocol.drafts import DraftingModel
from pipeline.protocol.messages import MOST_DRAFTED, MemoryBudget

if TYPE_CHECKING:
    from pipeline.engine.scheduler import Call, Group

PROBED_CHANCE = 0.5  # of the tokens by which it is learned what a pass costs
LEAST_PROBE, PROBE_SHARE = 4, 1 / 4  # tokens; and of the rows: a full batch may have no use for what it learns
# tokens that these may be expected to lose for each step so far: in a full batch each takes as long as a row
PROBED_LOSS = 1 / 4
UNSEEN_STEPS = 16  # that are sent ahead one after another
ROWS_A_STEP = 4  # whose texts are looked at in a step that may be sent ahead: it takes a part of a millisecond each


class Drafter:
    """Proposes tokens for the rows of an engine.

    Args:
        sources: in the order of preference among equally likely ones.
        encode_existing: the token ids of a row's existing answer. May raise RowError.
        pace: what passes cost; None: it is learned.
        model: proposes tokens, where there is one.
        draw: temperature and top_p of rows that have no other.
        rows_of_slots: of each host, the rows that a slot takes of its passes; 0 where they have no fixed shape.
        runs_ahead: whether a step may be sent before the tokens of the last one have arrived.

    Attributes:
        tallies: by source, what was verified so far.
        rows_of_slots: as given.
    """

    def __init__(
        self,
        sources: Sequence[DraftSource],
        encode_existing: Callable[[RunningRow], Sequence[int]],
        pace: Pace | None = None,
        *,
        model: DraftingModel | None = None,
        draw: tuple[float, float] = (1.0, 1.0),
        rows_of_slots: Sequence[int] = (),
        runs_ahead: bool = False,
    ) -> None:
        self.tallies: dict[DraftSource, Tally] = {source: Tally() for source in sources}
        has_fixed_shapes = bool(rows_of_slots) and all(rows_of_slots)
        self._pace = Pace(is_free=has_fixed_shapes) if pace is None else pace
        self._rates = Rates()
        self._texts = TextDrafts(sources, encode_existing, self._rates)
        self._model = None if model is None else ModelDrafts(model, self._rates, self._pace, draw)
        self.rows_of_slots = rows_of_slots
        self._lead = Lead() if has_fixed_shapes and runs_ahead else None
        self._completed_s = 0.0
        self._num_steps, self._probed_loss = 0, 0.0

    def wants_tokens(self, group: Group) -> bool:
        """Whether the next step is to wait for the pending tokens, where others are sent ahead.

        It does after a step with a draft; otherwise now and then, to see whether a draft would pay. Where passes have
        room for drafts it does as well when the tokens that are known say so.
        """
        if group.num_undrafted % UNSEEN_STEPS == 0:
            return True
        if self._lead is None or not self._lead.is_begun:
            return False
        return not self._pace.is_begun or self._is_promising(group, self._lead)

    def memory_budgets(self, row_tokens: int) -> Sequence[MemoryBudget]:
        """What a slot of the model takes with rows of `row_tokens` tokens; nothing without one."""
        return () if self._model is None else (self._model.model.memory_budget(row_tokens),)

    def resize(self, num_slots: int) -> None:
        """Have the model hold `num_slots` rows from now on."""
        if self._model is not None:
            self._model.resize(num_slots)

    def draft(self, group: Group) -> None:
        """Choose the drafts of a group's next step, as many as it has lanes for.

        The likeliest tokens come first, as long as each makes tokens cheaper; none where all of them together are not
        worth that the step after this one waits.
        """
        slots = group.drawing
        guesses, spent_s = self._guesses(group)
        counts, expected, num_positions = dict.fromkeys(guesses, 0), float(len(slots)), len(slots)
        order = [(-guess.chances[0], slot) for slot, guess in guesses.items()]
        heapq.heapify(order)
        most, is_probe = len(group.open_lanes), self._begins_probe(group, order)
        if is_probe:
            most = min(most, _probe_size(len(slots)))
        while order and num_positions - len(slots) < most:
            negative, slot = heapq.heappop(order)
            if is_probe:
                if -negative < PROBED_CHANCE:
                    break
                self._probed_loss += 1 + negative
            elif not self._pace.is_worth(-negative, expected, num_positions, spent_s=spent_s):
                break
            counts[slot], expected, num_positions = counts[slot] + 1, expected - negative, num_positions + 1
            if counts[slot] < len(chances := guesses[slot].chances):
                heapq.heappush(order, (-chances[counts[slot]], slot))
        if self._lead is not None:
            if self._completed_s and not group.calls:
                self._lead.note_gap(time.monotonic() - self._completed_s - spent_s)
            of_pass = num_positions, len(slots)
            if not self._lead.is_worth_waiting(expected, *of_pass, self._pace, spent_s=spent_s):
                counts.clear()
        group.guesses = {slot: guesses[slot].first(count) for slot, count in counts.items() if count}
        group.num_undrafted = 0 if group.guesses else group.num_undrafted + 1

    def _begins_probe(self, group: Group, order: Sequence[tuple[float, int]]) -> bool:
        """Whether this pass is made larger to learn what that costs, with the tokens that `order` begins with."""
        self._num_steps += 1
        if not order or -order[0][0] < PROBED_CHANCE or group.parts:
            return False
        most = self._probed_loss + (1 - PROBED_CHANCE) * _probe_size(len(group.drawing))
        return most <= PROBED_LOSS * self._num_steps and self._pace.begins_probe()

    def completed(self, call: Call) -> None:
        """Learn what a step took whose outcomes have arrived: from the one before, where that was later."""
        began_s, self._completed_s = max(call.sent_s, self._completed_s), time.monotonic()
        taken_s = self._completed_s - began_s
        if self._model is not None:
            self._model.completed(taken_s)
        if call.slots and not call.has_prompts:
            if self._lead is not None and call.is_ahead:
                self._lead.note_ahead(call.num_positions, taken_s)
            else:
                self._pace.note(call.num_positions, taken_s)

    def verified(self, running: RunningRow, guess: Guess | None, *, has_ended: bool) -> None:
        """Count what was drawn of a draft; a row that has ended is remembered as the sibling of others alone."""
        if guess is not None:
            tally = self.tallies[guess.source]
            tally.drafted += len(guess.tokens)
            tally.accepted += running.num_accepted
        if has_ended:
            self._texts.end(running)
            if self._model is not None:
                self._model.end(running)

    def _is_promising(self, group: Group, lead: Lead) -> bool:
        """Whether texts go on so well behind the tokens that are known, and those that are pending, that a draft is
        likely to be worth the wait."""
        rows = [group.running[slot] for slot in group.running.keys() - group.parts.keys()]
        if not rows or group.num_undrafted % max(1, len(rows) // ROWS_A_STEP):
            return False
        chances: list[float] = []
        for running in rows:
            if running.has_known_terms and (guess := self._texts.guess(running, MOST_DRAFTED)) is not None:
                chances += guess.chances[running.num_pending :]
        best = heapq.nlargest(len(group.open_lanes), chances)
        return lead.is_worth_waiting(len(rows) + sum(best), len(rows) + len(best), len(rows), self._pace)

    def _guesses(self, group: Group) -> tuple[dict[int, Guess], float]:
        """The likeliest proposals by slot, and the seconds that a model took for them."""
        found: dict[int, Guess] = {}
        asked: list[Asked] = []
        for slot in group.drawing:
            running = group.running[slot]
            most = min(MOST_DRAFTED, running.max_tokens - len(running.tokens) - running.num_pending - 1)
            if not running.has_known_terms or running.num_pending or most < 1:
                continue
            guess = self._texts.guess(running, most)
            if guess is not None:
                found[slot] = guess
            if self._model is None or self._model.is_off:
                continue
            row = Asked(slot, running, self._texts.read(running).text, most)
            if guess is None or guess.chances[0] < self._rates.of(row.any_key):
                asked.append(row)
        if self._model is None or not asked:
            return found, 0.0
        num_rows = len(group.drawing)
        of_model = self._model.guess(
            asked,
            num_rows=num_rows,
            most=len(group.open_lanes),
            may_try=not group.parts,
            wait_s=0.0 if self._lead is None else self._lead.wait_s(num_rows, self._pace),
        )
        for row in asked:
            if row.slot in of_model:
                self._texts.read(row.running).found[DraftSource.MODEL] = row.proposals
                if row.slot not in found or of_model[row.slot].chances[0] > found[row.slot].chances[0]:
                    found[row.slot] = of_model[row.slot]
        return found, self._model.spent_s


def _probe_size(num_rows: int) -> int:
    """The tokens of a pass that is made larger to learn what that costs, at most."""
    return max(int(PROBE_SHARE * num_rows), LEAST_PROBE)
