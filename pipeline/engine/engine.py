"""The decoding loop: rows in, records out, on any transport.

A step of a group: collect the drawn tokens, end rows, refill the slots that became free, send what is new to all
hosts. Two groups alternate, because a group's next step needs the tokens of its last one: with a single group the
hosts would be idle while the coordinator solves its games. A lone host samples by itself and needs no second group;
it is sent the next step before the tokens of the last one have arrived.

Rows own their tokens and draws, so whatever a host loses costs time and never a result: the running rows go back
into the queue and begin again. Nothing of a step is applied to rows before all of its replies have arrived. So every
row is at the same step on all hosts and here, and a step can fail as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, product

import cage
from cage.rule_names import RuleName
from pipeline.config.sections import DecodingConfig, Reproducibility, Trace
from pipeline.config.variants import Variant, sampling_of
from pipeline.engine.calls import HostCalls
from pipeline.engine.decoding import DecodingEngine
from pipeline.engine.drafting import Drafter
from pipeline.engine.prompter import Prompter
from pipeline.engine.reasoning import Turn
from pipeline.engine.recovery import MAX_CONSECUTIVE_LOSSES
from pipeline.engine.row_state import RunningRow
from pipeline.engine.scheduler import Call, Group, Slots
from pipeline.errors import CageError, HostError, HostOutOfMemory, RowError, StateLost
from pipeline.monitoring.counts import Recoveries, Work
from pipeline.monitoring.metrics import Load
from pipeline.protocol.hosts import Hosts
from pipeline.protocol.messages import Terms, TokenOutcome
from pipeline.protocol.topology import Topology
from pipeline.records import FinishReason, Record, Row
from pipeline.sampling.draws import Uniforms


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The prompts of the newest row by role, and the length of their shared prefixes."""

    row: Row | None = None
    prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shared_prefixes: Mapping[str, int] = field(default_factory=dict)
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that ended.

    Args:
        running: the row.
        reason: why it ended; None where it failed.
        turn: what was written; None where it failed.
        error: why it failed.
    """

    running: RunningRow
    reason: FinishReason | None = None
    turn: Turn | None = None
    error: str | None = None


class Engine:
    """Decodes many rows at once over the hosts of one replica.

    Args:
        topology: roles and principals.
        hosts: their clients.
        prompter: token ids of prompts and text of answers.
        decoding: candidates, temperature of the draw, limits.
        variants: the ways to answer a row.
        num_slots: rows at once; as many as every host has.
        num_groups: groups that alternate; 2 hides the coordinator's work behind the hosts'.
        max_failures: consecutive failures of hosts that are allowed while no row finishes in between.
        loaded_slots: slots of a host that was just started, where that is another number than `num_slots`.
        drafter: proposes tokens that passes verify; None: every pass gives a row one token.

    Attributes:
        num_steps: steps so far, over all groups.
        num_row_steps: tokens and parts of prompts computed so far, over all rows.
        recoveries: faults that were overcome so far.
        drafter: proposes tokens; None where nothing does.
    """

    def __init__(
        self,
        topology: Topology,
        hosts: Hosts,
        prompter: Prompter,
        decoding: DecodingConfig,
        variants: Sequence[Variant],
        *,
        num_slots: int,
        num_groups: int = 1,
        max_failures: int = 20,
        loaded_slots: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self._topology = topology
        sampling = sampling_of(decoding, variants)
        self._draw = sampling.temperature, sampling.top_p
        self._calls = HostCalls(topology, hosts, prompter, sampling, counts_reasoning=decoding.thinking.in_answers)
        self._prompter = prompter
        self._decoding = decoding
        self._variants = variants
        self._names = tuple(principal.name for principal in topology.principals)
        given = decoding.soft_threshold
        self._k = tuple(given[name] if isinstance(given, dict) else given for name in self._names)
        is_relaxed = decoding.reproducibility is Reproducibility.RELAXED
        rows_of_slots = () if drafter is None else drafter.rows_of_slots
        self._slots = Slots(num_slots, num_groups, keeps_tokens=is_relaxed, rows_of_slots=rows_of_slots)
        self._not_finite = "the rewards or the base's logits are not finite"
        if any(plan.is_reward_model for plan in topology.hosts):
            self._not_finite += ", or the text is longer than the context of a reward model"
        elif any(plan.scores_branches for plan in topology.hosts):
            self._not_finite += ", or the text is longer than the context of a model with other tokens"
        self._num_ahead = int(hosts.runs_ahead)
        self._loaded_slots = loaded_slots or num_slots
        self.drafter = drafter
        self._max_failures = max_failures
        self._consecutive_failures = self._consecutive_losses = 0
        self._ended: list[Ended] = []
        self._newest = _Encoded()
        self.num_steps = self.num_row_steps = 0
        self.recoveries = Recoveries()
        self._games = Work()

    @property
    def calls(self) -> HostCalls:
        """Sends the messages to the hosts, and counts the seconds that they took."""
        return self._calls

    @property
    def num_slots(self) -> int:
        """Rows at once."""
        return self._slots.num_slots

    @property
    def work(self) -> Work:
        """Games and seconds so far. May be read from another thread."""
        return replace(self._games, solve_s=self._calls.solve_s, wait_s=self._calls.wait_s)

    @property
    def load(self) -> Load:
        """How full the slots are."""
        return self._slots.load

    @property
    def wants_row(self) -> bool:
        """Whether a free slot waits for a row."""
        return self._slots.wants_row

    @property
    def num_waiting(self) -> int:
        """Rows without a slot, or whose prompts are not computed yet."""
        return self._slots.num_waiting

    @property
    def is_idle(self) -> bool:
        """Whether no row waits or runs and no record waits to be returned."""
        return self._slots.is_empty and not self._ended

    def admit(self, row: Row, variant: int = 0, sample: int = 0) -> None:
        """Queue one answer to a row; a row that cannot be decoded is returned by the next step as failed.

        Args:
            row: the input.
            variant: the index of one of the engine's variants.
            sample: which of the row's samples it is.
        """
        try:
            running = self.begin(row, variant, sample)
        except RowError as error:
            self._ended.append(Ended(self._begin(row, variant, sample), error=str(error)))
        else:
            self.enqueue(running)

    def begin(self, row: Row, variant: int = 0, sample: int = 0) -> RunningRow:
        """A row with its prompts, which is not queued. Raises RowError where it cannot be decoded."""
        running = self._begin(row, variant, sample)
        self._encode(running)
        return running

    def enqueue(self, running: RunningRow) -> None:
        """Queue a row that has its prompts."""
        self._slots.queue.append(running)

    def proposal_terms(self, rule: RuleName, terms: Terms) -> Terms:
        """The terms of a row whose tokens this rule proposes: they are drawn from its policy as it is."""
        as_it_is = (1.0, 1.0)
        draw = None if self._draw == as_it_is else as_it_is
        return replace(terms, rule=rule, k=self._k if rule.takes_k else (), draw=draw)

    def failed(self, row: Row, variant: int, sample: int, reason: str) -> Record:
        """The record of a row that cannot be decoded."""
        return self._begin(row, variant, sample).failed(reason)

    def resize(self) -> None:
        """Have the hosts forget their rows and hold as many as there are slots."""
        self._calls.resize(self.num_slots)

    def score(self, row: Row) -> dict[str, float]:
        """The rewards of a row's existing answer by principal, in nats, summed over it; nothing is drawn.

        Raises:
            RowError: the row cannot be read, has no answer, or is longer with it than a model's context.
            HostError: a host failed.
        """
        running = self._begin(row, 0, 0)
        self._encode(running)
        if row.response is None:
            raise RowError("there is no answer to score")
        answer, first = self._prompter.encode_existing(row, running.prompts)
        left = self._prompter.context_left(running.prompts)
        if left is not None and len(answer) > left:
            raise RowError(f"the answer has {len(answer)} tokens and the context holds {left} after the prompt")
        first = 0 if self._decoding.thinking.in_answers else first
        rewards = self._calls.score(running.prompts, answer, running.terms.weights, first).result()
        return dict(zip(self._names, rewards, strict=True))

    def step(self) -> list[Record]:
        """Advance one group by one token and return the records of the rows that ended, as `step_rows` does."""
        return [self.record(ended) for ended in self.step_rows()]

    def step_rows(self) -> list[Ended]:
        """Advance one group by one token and return the rows that ended.

        A host that lost its state, or has no memory for the rows, is dealt with here: rows begin again.

        Raises:
            HostError: a host cannot be used any more. No row is lost: call `recover` with other hosts.
        """
        group = self._slots.next_group()
        lacks_memory = False
        try:
            # a row whose reasoning is left alone or about to be closed, or that follows its own KL, is not sent ahead
            must_wait = any(row.must_wait for row in group.running.values())
            if self.drafter is not None:  # it proposes what follows tokens that are known
                must_wait |= self.drafter.wants_tokens(group)
            num_ahead = 0 if must_wait else self._num_ahead
            while len(group.calls) > num_ahead:
                self._ended += self._complete(group)
            if call := self._launch(group):
                group.calls.append(call)
            elif group.calls:  # nothing can be sent before the pending tokens are known
                self._ended += self._complete(group)
        except StateLost as error:
            self._rebuild(group, error)
        except HostOutOfMemory:
            lacks_memory = True
        if lacks_memory:  # after the except block: the error's frames hold tensors that have to be freed first
            self._halve()
        ended, self._ended = self._ended, []
        return ended

    def count_games(self, outcomes: Sequence[TokenOutcome]) -> None:
        """Count games that were solved."""
        self._games += Work(
            len(outcomes),
            sum(each.num_steps for each in outcomes),
            sum(each.status != cage.Status.CONVERGED for each in outcomes),
        )

    def make_room(self) -> bool:
        """Go on with half as many rows at once, for a call that lacked memory; False where there is one already."""
        if self.num_slots == 1:
            return False
        self._halve()
        return True

    def recover(self, hosts: Hosts, error: HostError) -> None:
        """Go on with other hosts after a failure: the running rows begin again.

        A row whose host fails repeatedly, in the end with no other row beside it, fails.

        Args:
            hosts: take the place of all hosts so far.
            error: what the last ones failed with.

        Raises:
            CageError: more than `max_failures` hosts failed and no row finished in between.
            HostError: one of the new hosts failed already.
        """
        self._calls.hosts = hosts
        self.recoveries += Recoveries(hosts_failed=1)
        self._consecutive_failures += 1
        self._consecutive_losses = 0
        poison = self._slots.isolation.host_failed(self._slots.take_back())
        if poison is not None:
            self._fail(poison, f"its host failed whenever it was decoded, alone at last: {error}")
        if self._consecutive_failures > self._max_failures:
            raise CageError(f"{self._consecutive_failures} hosts failed and no row was finished in between; {error}")
        if self._slots.num_slots != self._loaded_slots:
            self._calls.resize(self._slots.num_slots)

    def _rebuild(self, group: Group, error: StateLost) -> None:
        self._consecutive_losses += 1
        if self._consecutive_losses > MAX_CONSECUTIVE_LOSSES:
            raise error
        self.recoveries += Recoveries(states_lost=1)
        self._slots.take_back([group])

    def _halve(self) -> None:
        """Go on with half as many rows at once; a row that does not fit alone fails."""
        self.recoveries += Recoveries(memory_halved=1)
        was_alone = self._slots.num_slots == 1
        rows = self._slots.halve()
        if was_alone:
            for row in rows:
                self._fail(row, "its host has no memory for it even when it is decoded alone")
        self._calls.resize(self._slots.num_slots)
        if self.drafter is not None:
            self.drafter.resize(self._slots.num_slots)

    def _fail(self, running: RunningRow, reason: str) -> None:
        """Fail a row that waits to begin again."""
        self._slots.queue.remove(running)
        self._ended.append(Ended(running, error=reason))

    def _begin(self, row: Row, variant: int, sample: int) -> RunningRow:
        way = self._variants[variant]
        own = {name: weight for name, weight in (row.weights or {}).items() if weight is not None}
        weights = way.weights or {**self._topology.weights, **own}
        return RunningRow(
            row=row,
            sample=sample,
            variant=variant,
            principal_names=self._names,
            terms=Terms(
                way.rule,
                way.agent_temperature,
                tuple(float(weights[name]) for name in self._names),
                self._k if way.rule.takes_k else (),
                None if (draw := way.draw(self._decoding)) == self._draw else draw,
            ),
            target_kl=self._decoding.target_kl,
            unit=way.unit,
            temperature=way.draw(self._decoding)[0],
            # the variants of a prompt share its draws, so that what differs between them comes from the rule alone
            uniforms=Uniforms(self._decoding.seed if row.seed is None else row.seed, row.row_id, sample),
        )

    def _encode(self, running: RunningRow) -> None:
        """Give the row its prompts. Raises RowError where it cannot be read."""
        if running.row.error is not None:
            raise RowError(running.row.error)
        # the answers to one row are admitted one after another and share its prompts, unless a template reads weights
        weights = running.terms.weights if self._topology.takes_weights else ()
        if running.row is not self._newest.row or weights != self._newest.weights:
            messages = running.row.messages
            weights_by_name = dict(zip(self._names, running.terms.weights, strict=True))
            row = running.row
            prompts = self._prompter.encode(messages, weights_by_name, row.tools, self._prompter.kwargs_of(row))
            if row.response is not None and self._names:
                self._prompter.encode_existing(row, prompts)  # refused here, not while other rows run
            self._newest = _Encoded(running.row, prompts, self._prompter.shared_prefixes(messages, prompts), weights)
        running.prompts, running.shared_prefixes = self._newest.prompts, self._newest.shared_prefixes
        running.reasoning = self._prompter.begin_turn(running.row.messages, running.prompts)
        left = self._prompter.context_left(running.prompts)
        limit = self._decoding.max_new_tokens
        running.max_tokens = min(each for each in (limit, left, running.row.max_new_tokens) if each is not None)

    def _launch(self, group: Group) -> Call | None:
        """Fill free slots from the queue and send the hosts what is new."""
        self._slots.fill(group)
        num_rows = len(group.stepping) + len(group.parts)
        if not num_rows:
            return None
        # who observes games is shown those alone whose tokens were drawn
        if self.drafter is not None and self._calls.observer is None:
            self.drafter.draft(group)
        at, group.next = group.next, group.next.after
        call = self._calls.advance(at, group)
        for running in call.rows:
            running.requested()
        for running in group.end_step():
            self._calls.score_original(running)
        self.num_steps += 1
        self.num_row_steps += num_rows
        return call

    def _complete(self, group: Group) -> list[Ended]:
        """Collect the tokens of the oldest call; free the slots of the rows that ended."""
        call = group.calls.popleft()
        solved = self._calls.outcomes(call)
        self.count_games(solved)
        given = iter(solved)
        if self.drafter is not None:
            self.drafter.completed(call)
        drafts = [call.guesses[slot].tokens if slot in call.guesses else () for slot in call.slots]
        outcomes = [[next(given) for _ in range(len(draft) + 1)] for draft in drafts]
        going_on = [group.running.get(slot) is row for slot, row in zip(call.slots, call.rows, strict=True)]
        # a host that runs ahead computes one more token of a row that has ended meanwhile: it is dropped
        self.num_row_steps -= going_on.count(False)
        rows = list(compress(zip(call.slots, call.rows, outcomes, drafts, strict=True), going_on))
        for _, running, _, _ in rows:
            self._calls.collect_original(running)
        all_ended = []
        for slot, running, of_row, draft in rows:
            ended = self._apply(running, of_row, draft)
            if self.drafter is not None:
                self.drafter.verified(running, call.guesses.get(slot), has_ended=ended is not None)
            if ended:
                all_ended.append(ended)
                self._slots.isolation.finished(running)
                self._consecutive_failures = self._consecutive_losses = 0
                del group.running[slot]
                group.free.append(slot)
        group.free.sort()
        return all_ended

    def _apply(self, running: RunningRow, outcomes: Sequence[TokenOutcome], draft: Sequence[int]) -> Ended | None:
        """Append the drawn token to its row, and those of its draft that were drawn; say how that ended the row.

        What was computed behind a token of the draft holds if that token was drawn.
        """
        running.answered()
        stop = self._decoding.stop if running.row.stop is None else running.row.stop
        for proposed, outcome in zip([*draft, None], outcomes, strict=True):
            if outcome.status == cage.Status.NOT_FINITE:
                return Ended(running, error=f"token {len(running.tokens)}: {self._not_finite}")
            running.append(outcome)
            if finished := running.finish(self._prompter, stop):
                return Ended(running, *finished)
            if running.tokens[-1] != proposed:
                break
            running.num_accepted += 1
        return None

    def record(self, ended: Ended) -> Record:
        """The record of a row that ended."""
        if ended.reason is None or ended.turn is None:
            return ended.running.failed(str(ended.error))
        return ended.running.record(
            ended.reason,
            ended.turn,
            self._prompter,
            with_summary=self._decoding.trace is not Trace.NONE,
            with_tokens=self._decoding.trace is Trace.TOKENS,
            in_answers=self._decoding.thinking.in_answers,
        )


def decode_rows(
    engine: DecodingEngine, rows: Iterable[Row], *, num_variants: int = 1, num_samples: int = 1
) -> Iterator[Record]:
    """Decode every answer to every row; records are yielded as they end. Rows are read when slots become free.

    Args:
        engine: must be idle.
        rows: the input.
        num_variants: variants per row; the engine has at least as many.
        num_samples: samples per row and variant.

    Raises:
        HostError: a host failed; the engine must not be used any more.
    """
    waiting = ((row, *answer) for row in rows for answer in product(range(num_variants), range(num_samples)))
    exhausted = False
    while not (exhausted and engine.is_idle):
        while engine.wants_row and not exhausted:
            job = next(waiting, None)
            exhausted = job is None
            if job is not None:
                engine.admit(*job)
        yield from engine.step()
