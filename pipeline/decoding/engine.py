"""The decoding loop: rows in, records out, whatever runs the hosts.

A step of a group: collect the base's candidates, gather every principal's values at them, solve the games, draw one
token a row, refill the slots that became free, send the tokens to all hosts. Two groups alternate, so that hosts
compute one group while the other is being solved. B rows, J principals, K candidates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

import cage
from pipeline.config import DecodingConfig, Trace
from pipeline.decoding.draws import Uniforms
from pipeline.decoding.games import play, token_rewards
from pipeline.decoding.hosts import Hosts, Reply
from pipeline.decoding.lineup import BASE, Lineup
from pipeline.decoding.prompts import Prompter
from pipeline.decoding.running import RunningRow, TokenOutcome, rejected
from pipeline.errors import RowError
from pipeline.models.messages import Admission, Candidates, HostRole
from pipeline.records import Record, Row


@dataclass(slots=True)
class _Call:
    """What is under way for a group: the slots in the order of the batch, and the hosts' replies."""

    slots: list[int]
    advanced: list[Reply]
    proposal: Reply


@dataclass(slots=True)
class _Group:
    """Slots that step together."""

    free: list[int]
    running: dict[int, RunningRow] = field(default_factory=dict)
    call: _Call | None = None


class Engine:
    """Decodes many rows at once over the hosts of one replica.

    Args:
        lineup: roles and principals.
        hosts: clients by host name.
        prompter: token ids of prompts and text of answers.
        decoding: rule, temperatures, limits.
        num_slots: rows at once; as many as every host has.
        num_groups: groups that alternate; 2 hides the coordinator's work behind the hosts'.
    """

    def __init__(
        self,
        lineup: Lineup,
        hosts: Hosts,
        prompter: Prompter,
        decoding: DecodingConfig,
        *,
        num_slots: int,
        num_groups: int = 1,
    ) -> None:
        self._lineup = lineup
        self._hosts = hosts
        self._prompter = prompter
        self._decoding = decoding
        self._names = tuple(principal.name for principal in lineup.principals)
        self._groups = [_Group(list(range(at, num_slots, num_groups))) for at in range(min(num_groups, num_slots))]
        self._queue: deque[RunningRow] = deque()
        self._refused: list[Record] = []
        self._turn = 0
        self.num_steps = 0

    @property
    def has_room(self) -> bool:
        """Whether a free slot waits for a row."""
        return len(self._queue) < sum(len(group.free) for group in self._groups)

    @property
    def is_idle(self) -> bool:
        return not (self._queue or self._refused or any(group.running for group in self._groups))

    def admit(self, row: Row, sample: int = 0) -> None:
        """Queue one sample of a row; a row that cannot be decoded comes out of the next step as rejected."""
        try:
            self._queue.append(self._prepare(row, sample))
        except RowError as error:
            weights = {**self._lineup.weights, **(row.weights or {})}
            self._refused.append(rejected(row, sample, weights, str(error)))

    def step(self) -> list[Record]:
        """Advance one group by one token; the records of the rows that ended. Raises HostError."""
        records, self._refused = self._refused, []
        group = self._groups[self._turn]
        self._turn = (self._turn + 1) % len(self._groups)
        if group.call is not None:
            records += self._complete(group, group.call)
        group.call = self._launch(group)
        return records

    def _prepare(self, row: Row, sample: int) -> RunningRow:
        if row.error is not None:
            raise RowError(row.error)
        prompts = self._prompter.encode(row.messages)
        room = self._prompter.room(prompts)
        limit = self._decoding.max_new_tokens
        weights = {**self._lineup.weights, **(row.weights or {})}
        return RunningRow(
            row=row,
            sample=sample,
            principal_names=self._names,
            weights=tuple(float(weights[name]) for name in self._names),
            prompts=prompts,
            max_tokens=limit if room is None else min(limit, room),
            uniforms=Uniforms(self._decoding.seed, row.row_id, sample),
        )

    def _launch(self, group: _Group) -> _Call | None:
        """Fill free slots from the queue and send every host the new rows and the newest tokens."""
        admitted = []
        while group.free and self._queue:
            slot = group.free.pop(0)
            group.running[slot] = self._queue.popleft()
            admitted.append(slot)
        if not group.running:
            return None
        slots = sorted(group.running)
        stepping = [slot for slot in slots if slot not in admitted]
        tokens = [group.running[slot].tokens[-1] for slot in stepping]
        advanced = []
        for plan in self._lineup.hosts:
            admissions = [Admission(slot, self._prompts_for(plan.name, group.running[slot])) for slot in admitted]
            advanced.append(self._hosts[plan.name].submit("advance", admissions, stepping, tokens))
        candidates = self._decoding.candidates
        proposal = self._hosts[BASE].submit(
            "propose",
            slots,
            num_candidates=None if candidates == "all" else candidates,
            min_p=self._decoding.min_p,
        )
        for slot in admitted:
            self._score_original(group.running[slot])
        return _Call(slots, advanced, proposal)

    def _prompts_for(self, host: str, running: RunningRow) -> dict[str, Sequence[int]]:
        return {name: running.prompts[name] for name, role in self._lineup.roles.items() if role.host == host}

    def _score_original(self, running: RunningRow) -> None:
        """Ask for the rewards of an existing answer; they are collected when the row ends."""
        if running.row.response is None or not self._names:
            return
        answer = self._prompter.encode_answer(running.row.response)[: self._prompter.room(running.prompts)]
        for plan in self._lineup.hosts:
            prompts = self._prompts_for(plan.name, running)
            running.originals[plan.name] = self._hosts[plan.name].submit("score", prompts, answer)

    def _complete(self, group: _Group, call: _Call) -> list[Record]:
        """Collect, solve and draw for the rows of a call; free the slots of those that ended."""
        for reply in call.advanced:
            reply.result()
        proposal: Candidates = call.proposal.result()
        rows = [group.running[slot] for slot in call.slots]
        outcomes = play(
            self._decoding,
            proposal,
            self._gather_rewards(call.slots, proposal),
            [running.weights for running in rows],
            [running.uniforms.at(len(running.tokens)) for running in rows],
        )
        records = []
        for slot, running, outcome in zip(call.slots, rows, outcomes, strict=True):
            if record := self._apply(running, outcome):
                records.append(record)
                del group.running[slot]
                group.free.append(slot)
        group.free.sort()
        self.num_steps += 1
        return records

    def _gather_rewards(self, slots: list[int], proposal: Candidates) -> list[Tensor]:
        """Every principal's q [B, K] in nats at the candidates, from all hosts at once."""
        base, *others = self._lineup.hosts
        replies = [self._hosts[plan.name].submit("logprobs_at", slots, proposal.ids_BK) for plan in others]
        logprobs_BK = _by_role(base.roles, proposal.role_logprobs_BRK)
        for plan, reply in zip(others, replies, strict=True):
            logprobs_BK |= _by_role(plan.roles, reply.result())
        return token_rewards(self._lineup.principals, logprobs_BK)

    def _apply(self, running: RunningRow, outcome: TokenOutcome) -> Record | None:
        """Give the row its token; its record if that ended it."""
        if outcome.status == cage.Status.NOT_FINITE:
            weights = dict(zip(self._names, running.weights, strict=True))
            reason = f"token {len(running.tokens)}: the rewards or the base's logits are not finite"
            return rejected(running.row, running.sample, weights, reason)
        running.append(outcome)
        finished = running.finish(self._prompter, self._decoding.stop)
        if finished is None:
            return None
        return running.record(
            *finished,
            self._prompter,
            original_rewards=self._original_rewards(running),
            with_summary=self._decoding.trace is not Trace.NONE,
            with_tokens=self._decoding.trace is Trace.TOKENS,
        )

    def _original_rewards(self, running: RunningRow) -> list[float] | None:
        if not running.originals:
            return None
        logprobs_T: dict[str, Tensor] = {}
        for plan in self._lineup.hosts:
            logprobs_T |= dict(zip((r.name for r in plan.roles), running.originals[plan.name].result(), strict=True))
        return [float(reward_T.sum()) for reward_T in token_rewards(self._lineup.principals, logprobs_T)]


def decode_rows(engine: Engine, rows: Iterable[Row], *, num_samples: int = 1) -> Iterator[Record]:
    """Decode every sample of every row; records come as they end. Rows are drawn from `rows` as slots free up."""
    waiting = ((row, sample) for row in rows for sample in range(num_samples))
    exhausted = False
    while not (exhausted and engine.is_idle):
        while engine.has_room and not exhausted:
            job = next(waiting, None)
            exhausted = job is None
            if job is not None:
                engine.admit(*job)
        yield from engine.step()


def _by_role(roles: Sequence[HostRole], logprobs_BRK: Tensor) -> dict[str, Tensor]:
    return {role.name: logprobs_BRK[:, index] for index, role in enumerate(roles)}
