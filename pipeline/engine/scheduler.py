"""The scheduler: which rows wait, which run in which slot, and which calls of a group of slots are pending."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.engine.recovery import PoisonRowIsolation
from pipeline.engine.row_state import RunningRow
from pipeline.monitoring.metrics import Load
from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import (
    DRAFTED_PER_PASS,
    PROMPT_TOKENS_PER_STEP,
    Draft,
    Position,
    TokenOutcome,
    most_drafted,
)

if TYPE_CHECKING:
    from pipeline.engine.guesses import Guess


@dataclass(frozen=True, slots=True)
class Call:
    """A step of a group that was sent to the hosts and whose tokens have not been applied.

    Args:
        at: the position that it brings the hosts to.
        slots: that get a token, in the order of the batch; none where only prompts are read.
        rows: the rows in these slots when the step was sent.
        advanced: the replies of hosts that were asked to advance and nothing else.
        outcomes: what the step gives at the newest token of each row, and behind each token of its draft.
        guesses: by slot, the drafts that it verifies.
        sent_s: when it was sent.
        has_prompts: whether it also computes prompts.
        is_ahead: whether it was sent while tokens of the group were pending.
    """

    at: Position
    slots: list[int]
    rows: list[RunningRow]
    advanced: list[Reply[None]]
    outcomes: Reply[list[TokenOutcome]]
    guesses: Mapping[int, Guess] = field(default_factory=dict)
    sent_s: float = 0.0
    has_prompts: bool = False
    is_ahead: bool = False

    @property
    def num_positions(self) -> int:
        """Where it draws a token: one for each row, and one for each token of a draft."""
        return len(self.slots) + sum(len(guess.tokens) for guess in self.guesses.values())


@dataclass(slots=True)
class Group:
    """Slots that step together.

    Args:
        next: the position that the next call brings the hosts to.
        free: slots without a row, in ascending order.
        running: rows by slot, those whose prompts are being computed included.
        parts: by slot, the next part of a prompt that is being computed.
        calls: pending, the oldest first.
        lanes: numbers beyond all slots, for tokens of drafts.
        lends_slots: whether free slots are lanes, too, as in passes of fixed shapes, which hold all of them.
        guesses: by slot, the drafts of the next step.
        num_undrafted: steps since the last one with a draft.
    """

    next: Position
    free: list[int]
    running: dict[int, RunningRow] = field(default_factory=dict)
    parts: dict[int, int] = field(default_factory=dict)
    calls: deque[Call] = field(default_factory=deque)
    lanes: Sequence[int] = ()
    lends_slots: bool = False
    guesses: dict[int, Guess] = field(default_factory=dict)
    num_undrafted: int = 0

    @property
    def stepping(self) -> list[int]:
        """The slots whose rows append a token in the next step; one whose last token is pending does not."""
        return [
            slot for slot in sorted(self.running) if slot not in self.parts and not self.running[slot].is_at_its_end
        ]

    @property
    def drawing(self) -> list[int]:
        """The slots that get a token in the next step: those that append one, and those whose prompt ends with it."""
        filled = [slot for slot in self.parts if not self.is_filling_after(slot)]
        return sorted([*self.stepping, *filled])

    @property
    def open_lanes(self) -> Sequence[int]:
        """The lanes of the next step."""
        return [*self.lanes, *self.free][:DRAFTED_PER_PASS] if self.lends_slots else self.lanes

    @property
    def drafts(self) -> list[Draft]:
        """The drafts of the next step, with lanes for their tokens."""
        lanes = iter(self.open_lanes)
        return [
            Draft(slot, guess.tokens, [next(lanes) for _ in guess.tokens]) for slot, guess in self.guesses.items()
        ]

    def is_filling_after(self, slot: int) -> bool:
        """Whether the slot's prompt needs more steps than the present one."""
        return slot in self.parts and self.parts[slot] + 1 < self.running[slot].num_parts

    def end_step(self) -> list[RunningRow]:
        """Go on to the next part of every prompt; return the rows whose first part this was."""
        begun = [self.running[slot] for slot, part in self.parts.items() if part == 0]
        self.parts = {slot: part + 1 for slot, part in self.parts.items() if self.is_filling_after(slot)}
        return begun

    def take_back(self, *, keeps_tokens: bool) -> list[RunningRow]:
        """Empty the group and begin an epoch; return the rows that were running, ready to be admitted again.

        Pending calls are dropped without waiting: the new epoch makes their outcomes void.
        """
        rows = [self.running[slot] for slot in sorted(self.running)]
        for row in rows:
            row.restart(keeps_tokens=keeps_tokens)
        self.free = sorted([*self.free, *self.running])
        self.running.clear()
        self.parts.clear()
        self.calls.clear()
        self.guesses.clear()
        self.next = _first_position(self.next.group)
        return rows


class Slots:
    """All slots of an engine, in groups that take turns, and the rows that wait for one.

    Args:
        num_slots: rows at once.
        num_groups: groups that alternate.
        keeps_tokens: whether a row that is taken back keeps its tokens (relaxed) or begins from its start (strict:
            reading tokens as a prompt gives other last bits than reading them one by one).
        rows_of_slots: of each host, the rows that a slot takes of its passes; 0 where they have no fixed shape.

    Attributes:
        queue: rows that wait for a slot, in the order in which they get one.
        isolation: limits the rows at once after failures.
    """

    def __init__(
        self, num_slots: int, num_groups: int, *, keeps_tokens: bool, rows_of_slots: Sequence[int] = ()
    ) -> None:
        self.num_slots = num_slots
        self._rows_of_slots = rows_of_slots
        self.queue: deque[RunningRow] = deque()
        self.isolation = PoisonRowIsolation()
        self._num_groups = num_groups
        self._keeps_tokens = keeps_tokens
        self._groups = self._deal()
        self._turn = 0

    @property
    def wants_row(self) -> bool:
        """Whether a row is needed: one for each free slot, and some more, so that a slot that is freed in a step is
        filled in the same step."""
        spare = (self.num_slots + 1) // 2
        return len(self.queue) < self.isolation.limit(self.num_slots) - self._num_running + spare

    @property
    def is_empty(self) -> bool:
        """Whether no row waits or runs."""
        return not self.queue and not self._num_running

    @property
    def load(self) -> Load:
        """How full the slots are. May be read from another thread, while rows come and go."""
        groups = list(self._groups)
        filling = sum(len(group.parts) for group in groups)
        return Load(self.num_slots, sum(len(group.running) for group in groups), len(self.queue) + filling)

    @property
    def num_waiting(self) -> int:
        """Rows in the queue, and rows whose prompts are being computed."""
        return self.load.waiting

    def next_group(self) -> Group:
        """The group whose turn it is."""
        self._turn += 1
        return self._groups[self._turn % len(self._groups)]

    def fill(self, group: Group) -> None:
        """Give waiting rows the group's free slots, as many as a step's share of prompt tokens allows.

        One row is always admitted. Answers to one prompt share its tokens, which count once.
        """
        limit = self.isolation.limit(self.num_slots)
        filling = [group.running[slot] for slot in group.parts]
        num_tokens = sum(running.num_prompt_tokens for running in filling)
        while group.free and self.queue and self._num_running < limit:
            running = self.queue[0]
            if not filling or running.prompts is not filling[-1].prompts:
                num_tokens += running.num_prompt_tokens
            if filling and num_tokens > PROMPT_TOKENS_PER_STEP:
                break
            filling.append(self.queue.popleft())
            slot = group.free.pop(0)
            group.running[slot] = running
            group.parts[slot] = 0

    def take_back(self, groups: Sequence[Group] | None = None) -> list[RunningRow]:
        """Put running rows (of these groups, or all) back at the head of the queue, to begin again; return them."""
        rows = []
        for group in self._groups if groups is None else groups:
            rows += group.take_back(keeps_tokens=self._keeps_tokens)
        self.queue.extendleft(reversed(rows))
        return rows

    def halve(self) -> list[RunningRow]:
        """Have half as many slots from now on; return the rows that were taken back."""
        rows = self.take_back()
        self.num_slots = max(1, self.num_slots // 2)
        self._groups = self._deal()
        return rows

    @property
    def _num_running(self) -> int:
        return sum(len(group.running) for group in self._groups)

    def _deal(self) -> list[Group]:
        num_groups = min(self._num_groups, self.num_slots)
        num_lanes = min(most_drafted(self.num_slots, rows) for rows in (0, *self._rows_of_slots))
        return [
            Group(
                _first_position(at),
                list(range(at, self.num_slots, num_groups)),
                lanes=range(self.num_slots + at, self.num_slots + num_lanes, num_groups),
                lends_slots=any(self._rows_of_slots),
            )
            for at in range(num_groups)
        ]


def _first_position(group: int) -> Position:
    """Step 0 of an epoch that no host has seen. It is random, as a coordinator that was restarted does not know which
    epochs its hosts have seen; results do not depend on it."""
    return Position(group, secrets.randbits(48), 0)
