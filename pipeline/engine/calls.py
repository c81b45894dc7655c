"""The messages that an engine sends to its hosts, and what it makes of their replies.

With one host, which then holds every role, a step is one message: the host advances its rows and samples. With
several, the base's host proposes candidates, the others compute their values at them, and the games are solved here.
All messages of a step are sent at once, with the proposal as a reply that is still to come. A host runs its calls in
order: if the others were sent the proposal only when it has arrived, their calls would queue behind the next group's
forward pass, and that group's pass could no longer hide the time in which the games are solved.

B rows, K candidates, T tokens of an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pipeline.engine.prompter import Prompter
from pipeline.engine.row_state import RunningRow
from pipeline.engine.scheduler import Call, Group
from pipeline.protocol.hosts import Hosts, Reply, SamplingClient
from pipeline.protocol.messages import Admission, Candidates, Position, Step, Terms, TokenOutcome
from pipeline.protocol.specs import SamplingOptions
from pipeline.protocol.topology import HostPlan, Topology
from pipeline.sampling.games import by_role, reward_at_weights, solve_and_sample, token_rewards

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Observer = Callable[[Sequence[RunningRow], Candidates, Sequence["Tensor"]], None]


class HostCalls:
    """Sends the messages of one engine.

    Args:
        topology: roles and hosts.
        hosts: the clients of the topology's hosts.
        prompter: encodes existing answers.
        options: candidates and draws.
        counts_reasoning: whether the rewards of an existing answer count the reasoning before it.

    Attributes:
        hosts: may be replaced after a failure.
        observer: is shown the rows of every game that is solved here, the candidates, and q [B, K] by principal. A
            lone host that samples solves its games itself.
        solve_s: seconds in which games were solved here.
        wait_s: seconds in which replies were waited for.
    """

    def __init__(
        self,
        topology: Topology,
        hosts: Hosts,
        prompter: Prompter,
        options: SamplingOptions,
        *,
        counts_reasoning: bool = False,
    ) -> None:
        self.hosts = hosts
        self.observer: Observer | None = None
        self.solve_s = self.wait_s = 0.0
        self._topology = topology
        self._prompter = prompter
        self._options = options
        self._counts_reasoning = counts_reasoning

    def advance(self, at: Position, group: Group) -> Call:
        """Send every host parts of new prompts and the newest tokens, and ask for the next tokens.

        Does not wait; what fails is raised by `outcomes`.

        Args:
            at: the position after this step.
            group: the slots to advance.
        """
        slots, sent_s = group.drawing, time.monotonic()
        rows = [group.running[slot] for slot in slots]
        has_prompts = bool(group.parts)
        if not slots:  # long prompts take several steps
            return Call(at, slots, rows, self._advance(at, group, first=0), Reply.of([]), has_prompts=True)
        lanes = {draft.slot: draft.lanes for draft in group.drafts}
        # a token of a draft is asked about like a row: by its lane, with the draw of its step
        asked = [
            (place, row, ahead)
            for slot, row in zip(slots, rows, strict=True)
            for ahead, place in enumerate([slot, *lanes.get(slot, ())])
        ]
        places, terms = [place for place, _, _ in asked], [row.step_terms for _, row, _ in asked]
        uniforms = [row.uniform(ahead) for _, row, ahead in asked]
        sent = partial(
            Call,
            at,
            slots,
            rows,
            guesses=dict(group.guesses),
            sent_s=sent_s,
            has_prompts=has_prompts,
            is_ahead=bool(group.calls),
        )
        if (sampler := self.hosts.sampler) is not None:
            return sent(advanced=[], outcomes=self._sample(sampler, at, group, places, terms, uniforms))
        base, *others = self._topology.hosts
        proposal = self.hosts.base.advance_and_propose(
            at,
            self._step(base, group),
            places,
            num_candidates=self._options.num_candidates,
            min_p=self._options.min_p,
        )
        advanced = self._advance(at, group, first=1)
        num_tokens = [len(row.tokens) + ahead for _, row, ahead in asked]
        values = [
            client.values_at(at, places, num_tokens, proposal if self._needs_proposal(plan) else None)
            for plan, client in zip(others, self.hosts.others, strict=True)
        ]
        solve = partial(self._solve, [row for _, row, _ in asked], proposal, values, terms, uniforms)
        return sent(advanced=advanced, outcomes=Reply(solve))

    def outcomes(self, call: Call) -> list[TokenOutcome]:
        """What the step gave each row, and behind each token of its draft, in the order of the call's slots.

        Waits for the hosts. Raises HostError.

        No outcome is returned before every host has answered: a row that got its token while a host failed would
        begin its next step from a state that this host does not have.
        """
        for reply in call.advanced:
            self._wait(reply)
        return self._wait(call.outcomes) if self.hosts.sampler is not None else call.outcomes.result()

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float], first: int = 0
    ) -> Reply[list[float]]:
        """Ask every host about an existing answer; the reply is its reward by principal, in nats, summed over it.

        Args:
            prompts: token ids by role.
            answer: the answer's token ids.
            weights: the row's, by principal.
            first: the first of them that counts; those before it are read alone.
        """
        scores = [
            client.score(self._of_host(plan.name, prompts), answer, weights)
            for plan, client in zip(self._topology.hosts, self.hosts.all, strict=True)
        ]
        return Reply(partial(self._sum_rewards, scores, first))

    def score_original(self, running: RunningRow) -> None:
        """Ask for the rewards of a row's existing answer; they are collected with its next token.

        An answer that does not fit into a role's context is not scored: a part of it has other rewards.
        """
        if running.row.response is None or not self._topology.principals or running.original_rewards is not None:
            return
        answer, first = self._prompter.encode_existing(running.row, running.prompts)
        left = self._prompter.context_left(running.prompts)
        if left is not None and len(answer) > left:
            return
        counted_from = 0 if self._counts_reasoning else first
        running.original_scores = self.score(running.prompts, answer, running.terms.weights, counted_from)

    def collect_original(self, running: RunningRow) -> None:
        """Wait for the rewards of an existing answer, if they were asked for."""
        if running.original_scores is None:
            return
        rewards, running.original_scores = running.original_scores.result(), None
        # an answer that is too long for a reward model cannot be compared
        running.original_rewards = rewards if all(map(math.isfinite, rewards)) else None

    def resize(self, num_slots: int) -> None:
        """Have every host forget its rows and hold `num_slots` of them from now on. Raises HostError."""
        for reply in [client.resize(num_slots) for client in self.hosts.all]:
            reply.result()

    def _advance(self, at: Position, group: Group, *, first: int) -> list[Reply[None]]:
        """Ask the hosts from the `first` on to advance and nothing else."""
        pairs = list(zip(self._topology.hosts, self.hosts.all, strict=True))[first:]
        return [client.advance(at, self._step(plan, group)) for plan, client in pairs]

    def _sample(
        self,
        sampler: SamplingClient,
        at: Position,
        group: Group,
        places: Sequence[int],
        terms: Sequence[Terms],
        uniforms: Sequence[float],
    ) -> Reply[list[TokenOutcome]]:
        return sampler.advance_and_sample(at, self._step(self._topology.hosts[0], group), places, terms, uniforms)

    def _solve(
        self,
        rows: Sequence[RunningRow],
        proposal: Reply[Candidates],
        values: Sequence[Reply[Tensor]],
        terms: Sequence[Terms],
        uniforms: Sequence[float],
    ) -> list[TokenOutcome]:
        """Wait for candidates and values, then solve the games and draw."""
        candidates = self._wait(proposal)
        base, *others = self._topology.hosts
        outputs_BK = by_role(base.roles, candidates.role_logprobs_BRK)
        for plan, reply in zip(others, values, strict=True):
            values_BRK = self._wait(reply).to(candidates.base_logprobs_BK.device)
            outputs_BK |= by_role(plan.roles, values_BRK)
        principals = self._topology.principals
        rewards, at_weights = token_rewards(principals, outputs_BK), reward_at_weights(principals, outputs_BK)
        if self.observer is not None:
            self.observer(rows, candidates, rewards)
        started_s = time.perf_counter()
        sampled = solve_and_sample(self._options, candidates, rewards, terms, uniforms, at_weights)
        outcomes = sampled.outcomes(terms)
        self.solve_s += time.perf_counter() - started_s
        return outcomes

    def _needs_proposal(self, plan: HostPlan) -> bool:
        """Whether a host must be sent the candidates. A language model knows the whole vocabulary without them."""
        return self._options.num_candidates is not None or plan.scores_branches

    def _step(self, plan: HostPlan, group: Group) -> Step:
        """What is new for a host."""
        stepping = group.stepping
        tokens = [group.running[slot].newest_token for slot in stepping]
        admissions = [self._admission(plan, slot, group.running[slot], part) for slot, part in group.parts.items()]
        accepted = {slot: count for slot in stepping if (count := group.running[slot].num_accepted)}
        return Step(admissions, stepping, tokens, accepted, group.drafts)

    def _admission(self, plan: HostPlan, slot: int, running: RunningRow, part: int) -> Admission:
        """A part of the row's prompts, with the tokens that it kept if it is admitted again."""
        return Admission(
            slot,
            self._of_host(plan.name, running.prompts),
            running.shared_prefixes,
            part,
            is_last=part + 1 == running.num_parts,
            # a copy: the row may draw more tokens before the message is serialized
            answer=tuple(running.tokens),
            weights=running.terms.weights,
        )

    def _of_host(self, host: str, prompts: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
        """The prompts of a host's roles."""
        return {name: prompts[name] for name, role in self._topology.roles.items() if role.host == host}

    def _sum_rewards(self, scores: Sequence[Reply[Tensor]], first: int) -> list[float]:
        outputs_T: dict[str, Tensor] = {}
        for plan, reply in zip(self._topology.hosts, scores, strict=True):
            scores_RT = self._wait(reply)
            outputs_T |= dict(zip((role.name for role in plan.roles), scores_RT, strict=True))
        return [float(reward_T[first:].sum()) for reward_T in token_rewards(self._topology.principals, outputs_T)]

    def _wait(self, reply: Reply[T]) -> T:
        started_s = time.perf_counter()
        value = reply.result()
        self.wait_s += time.perf_counter() - started_s
        return value
