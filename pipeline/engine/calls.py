"""What an engine says to its hosts, and what becomes of their answers.

With one host, which then holds every role, a step is one call: it advances its rows and plays. With several, the
base's host proposes candidates, the others give their values at them, and the games are played here. All calls are
sent at once, the proposal as a reply that is yet to come: were the values asked for when it is there, they would wait
behind the next group's forward pass, and nothing would be left to hide the games behind.

B rows, K candidates, T tokens of an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.config.sections import Config, DecodingConfig
from pipeline.engine.prompts import Prompter
from pipeline.engine.row_state import RunningRow, TokenOutcome
from pipeline.engine.scheduler import Call, Group
from pipeline.protocol.clients import Hosts, Reply
from pipeline.protocol.messages import Admission, Candidates, Position, Step
from pipeline.runtime.topology import HostPlan, Topology
from pipeline.sampling.games import by_role, num_candidates, play, token_rewards
from pipeline.worker.memory import slots_that_fit
from pipeline.worker.reward_values import ScoredAnswer, ask_rewards, spread_rewards

LONG_PROMPT = 1024  # tokens of a prompt for which a slot has memory, where the model's context is as long


def agree_on_slots(config: Config, hosts: Hosts) -> int:
    """The slots of a replica: the configured number, or what there is memory for everywhere; all hosts are told."""
    if config.cluster.slots != "auto":
        return config.cluster.slots
    row_tokens = LONG_PROMPT + config.decoding.max_new_tokens
    num_slots = slots_that_fit([host.submit("room", row_tokens).result() for host in hosts.values()])
    for host in hosts.values():
        host.submit("resize", num_slots).result()
    return num_slots


class HostCalls:
    """The calls of one engine. `hosts` may be replaced.

    `solve_s` and `wait_s` are the seconds in which games were played here and in which answers were waited for.
    """

    def __init__(self, topology: Topology, hosts: Hosts, prompter: Prompter, decoding: DecodingConfig) -> None:
        self.hosts = hosts
        self.solve_s = self.wait_s = 0.0
        self._lineup = topology
        self._prompter = prompter
        self._decoding = decoding

    def advance(self, at: Position, group: Group) -> Call:
        """Send every host parts of new prompts and the newest tokens, and ask for the next ones."""
        slots = group.drawing
        rows = [group.running[slot] for slot in slots]
        base, *others = self._lineup.hosts
        if not slots:
            advanced = [self._submit_step(plan, "advance", at, group) for plan in self._lineup.hosts]
            return Call(at, slots, rows, advanced, None, [])
        if not others:
            terms, uniforms = [row.terms for row in rows], [row.uniform for row in rows]
            answer = self._submit_step(base, "advance_and_sample", at, group, slots, terms, uniforms)
            return Call(at, slots, rows, [], answer, [])
        num, min_p = num_candidates(self._decoding), self._decoding.min_p
        answer = self._submit_step(base, "advance_and_propose", at, group, slots, num_candidates=num, min_p=min_p)
        advanced = [self._submit_step(plan, "advance", at, group) for plan in others]
        return Call(at, slots, rows, advanced, answer, self._ask_values(at, rows, slots, answer))

    def outcomes(self, call: Call) -> list[TokenOutcome]:
        """What the step gave each row; waits for the hosts. Raises HostError."""
        for reply in call.advanced:
            self._wait(reply)
        if call.answer is None:
            return []
        answer = self._wait(call.answer)
        if self._is_alone:
            outcomes: list[TokenOutcome] = answer
            return outcomes
        rewards = self._gather_rewards(call, answer)
        started_s = time.perf_counter()
        uniforms = [row.uniforms.at(len(row.tokens)) for row in call.rows]
        terms = [row.terms for row in call.rows]
        outcomes = play(self._decoding, answer, rewards, terms, uniforms).outcomes(terms)
        self.solve_s += time.perf_counter() - started_s
        return outcomes

    def score_original(self, running: RunningRow) -> None:
        """Ask for the rewards of an existing answer; they are collected with the row's next token."""
        if running.row.response is None or not self._lineup.principals or running.original_rewards is not None:
            return
        answer = self._prompter.encode_answer(running.row.response)[: self._prompter.room(running.prompts)]
        for plan in self._lineup.hosts:
            prompts = self._prompts_for(plan.name, running)
            reply = self.hosts[plan.name].submit("score", prompts, answer)
            running.originals[plan.name] = ScoredAnswer(reply, plan.scorings) if plan.scorings else reply

    def collect_original(self, running: RunningRow) -> None:
        """Wait for the rewards of an existing answer, if they were asked for."""
        if not running.originals:
            return
        logprobs_T: dict[str, Tensor] = {}
        for plan in self._lineup.hosts:
            scores = self._wait(running.originals[plan.name])
            logprobs_T |= dict(zip((role.name for role in plan.roles), scores, strict=True))
        running.originals.clear()
        rewards = [float(reward_T.sum()) for reward_T in token_rewards(self._lineup.principals, logprobs_T)]
        # an answer that is too long for a reward model cannot be compared
        running.original_rewards = rewards if all(map(math.isfinite, rewards)) else None

    def resize(self, num_slots: int) -> None:
        """Have every host forget its rows and hold another number of them."""
        for reply in [host.submit("resize", num_slots) for host in self.hosts.values()]:
            reply.result()

    @property
    def _is_alone(self) -> bool:
        return len(self._lineup.hosts) == 1

    def _submit_step(
        self, plan: HostPlan, method: str, at: Position, group: Group, *args: Any, **kwargs: Any
    ) -> Reply:
        """Call a method that begins a step, with what is new."""
        stepping = group.stepping
        tokens = [group.running[slot].newest_token for slot in stepping]
        admissions = [self._admission(plan, slot, group.running[slot], part) for slot, part in group.parts.items()]
        step = Step(admissions, stepping, tokens)
        return self.hosts[plan.name].submit(method, at, step, *args, **kwargs)

    def _ask_values(
        self, at: Position, rows: Sequence[RunningRow], slots: Sequence[int], proposal: Reply
    ) -> list[Reply]:
        """Ask the hosts beside the base's for their values at the candidates of a proposal on its way."""
        num_tokens = [len(row.tokens) for row in rows]
        candidates = None if num_candidates(self._decoding) is None else proposal
        return [
            ask_rewards(self.hosts[plan.name], plan.scorings, at, slots, num_tokens, proposal)
            if plan.scorings
            else self.hosts[plan.name].submit("logprobs_at", at, slots, candidates)
            for plan in self._lineup.hosts[1:]
        ]

    def _admission(self, plan: HostPlan, slot: int, running: RunningRow, part: int) -> Admission:
        """A part of the row's prompts, with the tokens that it kept if it is admitted again."""
        prompts = self._prompts_for(plan.name, running)
        is_last = part + 1 == running.num_parts
        if plan.scorings:
            return Admission(slot, prompts, running.heads, part, is_last, running.tokens)
        prompts = {role: [*prompt, *running.tokens] for role, prompt in prompts.items()}
        return Admission(slot, prompts, running.heads, part, is_last)

    def _prompts_for(self, host: str, running: RunningRow) -> dict[str, Sequence[int]]:
        return {name: running.prompts[name] for name, role in self._lineup.roles.items() if role.host == host}

    def _gather_rewards(self, call: Call, proposal: Candidates) -> list[Tensor]:
        """Every principal's q [B, K] in nats at the candidates, from all hosts at once."""
        base, *others = self._lineup.hosts
        num_tokens = [len(row.tokens) for row in call.rows]
        logprobs_BK = by_role(base.roles, proposal.role_logprobs_BRK)
        for plan, reply in zip(others, call.values, strict=True):
            values = self._wait(reply)
            if plan.scorings:
                values = spread_rewards(values, plan.scorings, num_tokens, proposal)
            logprobs_BK |= by_role(plan.roles, values.to(proposal.base_logprobs_BK.device))
        return token_rewards(self._lineup.principals, logprobs_BK)

    def _wait(self, reply: Reply) -> Any:
        started_s = time.perf_counter()
        answer = reply.result()
        self.wait_s += time.perf_counter() - started_s
        return answer
