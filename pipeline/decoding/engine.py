"""The decoding loop: rows in, records out, whatever runs the hosts.

A step of a group: collect the base's candidates, gather every principal's values at them, solve the games, draw one
token a row, refill the slots that became free, send the tokens to all hosts. Two groups alternate, so that hosts
compute one group while the other is being solved. B rows, J principals, K candidates.

Rows own their tokens and draws, so whatever a host loses costs time and never a result: the rows under way are taken
back into the queue and begin again. Nothing of a step is applied before all of its answers are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from torch import Tensor

import cage
from pipeline.config import DecodingConfig, Reproducibility, Trace
from pipeline.counts import Recoveries
from pipeline.decoding.draws import Uniforms
from pipeline.decoding.games import play, token_rewards
from pipeline.decoding.groups import Call, Group, Slots
from pipeline.decoding.hosts import Hosts, Reply
from pipeline.decoding.lineup import BASE, HostPlan, Lineup
from pipeline.decoding.prompts import Prompter
from pipeline.decoding.recovery import MAX_LOSSES_IN_A_ROW
from pipeline.decoding.reward_replies import ScoredAnswer, ask_rewards
from pipeline.decoding.running import RunningRow, Terms, TokenOutcome
from pipeline.errors import CageError, HostError, HostOutOfMemory, RowError, StateLost
from pipeline.models.messages import Admission, Candidates, HostRole
from pipeline.records import Record, Row
from pipeline.variants import Variant


class Engine:
    """Decodes many rows at once over the hosts of one replica.

    Args:
        lineup: roles and principals.
        hosts: clients by host name.
        prompter: token ids of prompts and text of answers.
        decoding: candidates, temperature of the draw, limits.
        variants: the ways to answer a row.
        num_slots: rows at once; as many as every host has.
        num_groups: groups that alternate; 2 hides the coordinator's work behind the hosts'.
        max_failures: hosts that may fail in a row, no row being finished in between.
    """

    def __init__(
        self,
        lineup: Lineup,
        hosts: Hosts,
        prompter: Prompter,
        decoding: DecodingConfig,
        variants: Sequence[Variant],
        *,
        num_slots: int,
        num_groups: int = 1,
        max_failures: int = 20,
    ) -> None:
        self._lineup = lineup
        self._hosts = hosts
        self._prompter = prompter
        self._decoding = decoding
        self._variants = variants
        self._names = tuple(principal.name for principal in lineup.principals)
        is_relaxed = decoding.reproducibility is Reproducibility.RELAXED
        self._slots = Slots(num_slots, num_groups, keeps_tokens=is_relaxed)
        self._given_slots = num_slots
        self._not_finite = "the rewards or the base's logits are not finite"
        if any(plan.scorings for plan in lineup.hosts):
            self._not_finite += ", or the text is longer than the context of a reward model"
        self._max_failures = max_failures
        self._failures_in_a_row = self._losses_in_a_row = 0
        self._ended: list[Record] = []
        self.num_steps = 0
        self.recoveries = Recoveries()

    @property
    def has_room(self) -> bool:
        """Whether a free slot waits for a row."""
        return self._slots.has_room

    @property
    def is_idle(self) -> bool:
        return self._slots.is_empty and not self._ended

    def admit(self, row: Row, variant: int = 0, sample: int = 0) -> None:
        """Queue one answer to a row; a row that cannot be decoded comes out of the next step as rejected."""
        running = self._begin(row, variant, sample)
        try:
            self._encode(running)
        except RowError as error:
            self._ended.append(running.rejected(str(error)))
        else:
            self._slots.queue.append(running)

    def step(self) -> list[Record]:
        """Advance one group by one token; the records of the rows that ended.

        Raises:
            HostError: a host is of no use any more; nothing is lost, and `recover` goes on with others.
        """
        group = self._slots.next_group()
        try:
            if group.call is not None:
                self._ended += self._complete(group, group.call)
            group.call = self._launch(group)
        except StateLost as error:
            self._rebuild(group, error)
        except HostOutOfMemory:
            self._halve()
        ended, self._ended = self._ended, []
        return ended

    def recover(self, hosts: Hosts, error: HostError) -> None:
        """Go on with other hosts after a failure: the rows under way begin again; one that fails again and again,
        alone at last, is rejected. Raises CageError after `max_failures` without a finished row."""
        self._hosts = hosts
        self.recoveries += Recoveries(hosts_failed=1)
        self._failures_in_a_row += 1
        self._losses_in_a_row = 0
        culprit = self._slots.suspicion.host_failed(self._slots.take_back())
        if culprit is not None:
            self._refuse(culprit, f"its host failed whenever it was decoded, alone at last: {error}")
        if self._failures_in_a_row > self._max_failures:
            raise CageError(f"{self._failures_in_a_row} hosts failed and no row was finished in between; {error}")
        if self._slots.num_slots < self._given_slots:
            self._resize_hosts()

    def _rebuild(self, group: Group, error: StateLost) -> None:
        self._losses_in_a_row += 1
        if self._losses_in_a_row > MAX_LOSSES_IN_A_ROW:
            raise error
        self.recoveries += Recoveries(states_lost=1)
        self._slots.take_back([group])

    def _halve(self) -> None:
        """Go on with half the rows at once; a row that does not fit alone is rejected."""
        self.recoveries += Recoveries(memory_halved=1)
        was_alone = self._slots.num_slots == 1
        rows = self._slots.halve()
        if was_alone:
            for row in rows:
                self._refuse(row, "its host has no memory for it even when it is decoded alone")
        self._resize_hosts()

    def _resize_hosts(self) -> None:
        for reply in [host.submit("resize", self._slots.num_slots) for host in self._hosts.values()]:
            reply.result()

    def _refuse(self, running: RunningRow, reason: str) -> None:
        """Reject a row that waits to begin again."""
        self._slots.queue.remove(running)
        self._ended.append(running.rejected(reason))

    def _begin(self, row: Row, variant: int, sample: int) -> RunningRow:
        way = self._variants[variant]
        weights = way.weights or {**self._lineup.weights, **(row.weights or {})}
        return RunningRow(
            row=row,
            sample=sample,
            variant=variant,
            principal_names=self._names,
            terms=Terms(way.rule, way.agent_temperature, tuple(float(weights[name]) for name in self._names)),
            # the variants of a prompt share its draws: what differs between them is the rule's doing
            uniforms=Uniforms(self._decoding.seed, row.row_id, sample),
        )

    def _encode(self, running: RunningRow) -> None:
        """Give the row its prompts. Raises RowError where it cannot be read."""
        if running.row.error is not None:
            raise RowError(running.row.error)
        running.prompts = self._prompter.encode(running.row.messages)
        room = self._prompter.room(running.prompts)
        limit = self._decoding.max_new_tokens
        running.max_tokens = limit if room is None else min(limit, room)

    def _launch(self, group: Group) -> Call | None:
        """Fill free slots from the queue and send every host the new rows and the newest tokens."""
        admitted = self._slots.fill(group)
        if not group.running:
            return None
        slots = sorted(group.running)
        stepping = [slot for slot in slots if slot not in admitted]
        tokens = [group.running[slot].tokens[-1] for slot in stepping]
        at, group.next = group.next, group.next.after
        advanced = []
        for plan in self._lineup.hosts:
            admissions = [self._admission(plan, slot, group.running[slot]) for slot in admitted]
            advanced.append(self._hosts[plan.name].submit("advance", at, admissions, stepping, tokens))
        candidates = self._decoding.candidates
        proposal = self._hosts[BASE].submit(
            "propose",
            at,
            slots,
            num_candidates=None if candidates == "all" else candidates,
            min_p=self._decoding.min_p,
        )
        for slot in admitted:
            self._score_original(group.running[slot])
        return Call(at, slots, advanced, proposal)

    def _admission(self, plan: HostPlan, slot: int, running: RunningRow) -> Admission:
        """The row's prompts, with the tokens that it kept if it is admitted again."""
        prompts = self._prompts_for(plan.name, running)
        if plan.scorings:
            return Admission(slot, prompts, running.tokens)
        return Admission(slot, {role: [*prompt, *running.tokens] for role, prompt in prompts.items()})

    def _prompts_for(self, host: str, running: RunningRow) -> dict[str, Sequence[int]]:
        return {name: running.prompts[name] for name, role in self._lineup.roles.items() if role.host == host}

    def _score_original(self, running: RunningRow) -> None:
        """Ask for the rewards of an existing answer; they are collected when the row ends."""
        if running.row.response is None or not self._names or running.original_rewards is not None:
            return
        answer = self._prompter.encode_answer(running.row.response)[: self._prompter.room(running.prompts)]
        for plan in self._lineup.hosts:
            prompts = self._prompts_for(plan.name, running)
            reply = self._hosts[plan.name].submit("score", prompts, answer)
            running.originals[plan.name] = ScoredAnswer(reply, plan.scorings) if plan.scorings else reply

    def _complete(self, group: Group, call: Call) -> list[Record]:
        """Collect, solve and draw for the rows of a call; free the slots of those that ended."""
        for reply in call.advanced:
            reply.result()
        proposal: Candidates = call.proposal.result()
        rows = [group.running[slot] for slot in call.slots]
        outcomes = play(
            self._decoding,
            proposal,
            self._gather_rewards(call, proposal, [len(running.tokens) for running in rows]),
            [running.terms for running in rows],
            [running.uniforms.at(len(running.tokens)) for running in rows],
        )
        for running in rows:
            self._collect_original(running)
        records = []
        for slot, running, outcome in zip(call.slots, rows, outcomes, strict=True):
            if record := self._apply(running, outcome):
                records.append(record)
                self._slots.suspicion.finished(running)
                self._failures_in_a_row = self._losses_in_a_row = 0
                del group.running[slot]
                group.free.append(slot)
        group.free.sort()
        self.num_steps += 1
        return records

    def _gather_rewards(self, call: Call, proposal: Candidates, num_tokens: Sequence[int]) -> list[Tensor]:
        """Every principal's q [B, K] in nats at the candidates, from all hosts at once."""
        base, *others = self._lineup.hosts
        replies: list[Reply] = []
        for plan in others:
            host = self._hosts[plan.name]
            if plan.scorings:
                replies.append(ask_rewards(host, plan.scorings, call.at, call.slots, num_tokens, proposal))
            else:
                replies.append(host.submit("logprobs_at", call.at, call.slots, proposal.ids_BK))
        logprobs_BK = _by_role(base.roles, proposal.role_logprobs_BRK)
        for plan, reply in zip(others, replies, strict=True):
            logprobs_BK |= _by_role(plan.roles, reply.result())
        return token_rewards(self._lineup.principals, logprobs_BK)

    def _apply(self, running: RunningRow, outcome: TokenOutcome) -> Record | None:
        """Give the row its token; its record if that ended it."""
        if outcome.status == cage.Status.NOT_FINITE:
            return running.rejected(f"token {len(running.tokens)}: {self._not_finite}")
        running.append(outcome)
        finished = running.finish(self._prompter, self._decoding.stop)
        if finished is None:
            return None
        return running.record(
            *finished,
            self._prompter,
            with_summary=self._decoding.trace is not Trace.NONE,
            with_tokens=self._decoding.trace is Trace.TOKENS,
        )

    def _collect_original(self, running: RunningRow) -> None:
        if not running.originals:
            return
        logprobs_T: dict[str, Tensor] = {}
        for plan in self._lineup.hosts:
            logprobs_T |= dict(zip((r.name for r in plan.roles), running.originals[plan.name].result(), strict=True))
        running.originals.clear()
        rewards = [float(reward_T.sum()) for reward_T in token_rewards(self._lineup.principals, logprobs_T)]
        # an answer that is too long for a reward model cannot be compared
        running.original_rewards = rewards if all(map(math.isfinite, rewards)) else None


def decode_rows(
    engine: Engine, rows: Iterable[Row], *, num_variants: int = 1, num_samples: int = 1
) -> Iterator[Record]:
    """Decode every answer to every row; records come as they end. Rows are drawn from `rows` as slots free up."""
    waiting = ((row, *answer) for row in rows for answer in product(range(num_variants), range(num_samples)))
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
