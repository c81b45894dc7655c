"""What an engine says to its hosts, and what becomes of their answers.

With one host, which then holds every role, a step is two calls: advance, and play. With several, the base's host
proposes candidates, the others give their values at them, and the games are played here.

B rows, K candidates, T tokens of an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.config import Config, DecodingConfig
from pipeline.decoding.games import play, token_rewards
from pipeline.decoding.groups import Call, Group
from pipeline.decoding.hosts import Hosts, Reply
from pipeline.decoding.lineup import BASE, HostPlan, Lineup
from pipeline.decoding.playing import by_role, num_candidates
from pipeline.decoding.prompts import Prompter
from pipeline.decoding.reward_replies import ScoredAnswer, ask_rewards
from pipeline.decoding.running import RunningRow, TokenOutcome
from pipeline.models.messages import Admission, Candidates, Position

LONG_PROMPT = 1024  # tokens of a prompt for which a slot has memory, where the model's context is as long


def agree_on_slots(config: Config, hosts: Hosts) -> int:
    """The slots of a replica: the configured number, or what the host with the least room holds; all are told."""
    if config.cluster.slots != "auto":
        return config.cluster.slots
    row_tokens = LONG_PROMPT + config.decoding.max_new_tokens
    num_slots: int = min(host.submit("fitting_slots", row_tokens).result() for host in hosts.values())
    for host in hosts.values():
        host.submit("resize", num_slots).result()
    return num_slots


class HostCalls:
    """The calls of one engine. `hosts` may be replaced.

    `solve_s` and `wait_s` are the seconds in which games were played here and in which answers were waited for.
    """

    def __init__(self, lineup: Lineup, hosts: Hosts, prompter: Prompter, decoding: DecodingConfig) -> None:
        self.hosts = hosts
        self.solve_s = self.wait_s = 0.0
        self._lineup = lineup
        self._prompter = prompter
        self._decoding = decoding

    def advance(self, at: Position, group: Group) -> Call:
        """Send every host parts of new prompts and the newest tokens, and ask for the next ones."""
        stepping = [slot for slot in sorted(group.running) if slot not in group.parts]
        tokens = [group.running[slot].tokens[-1] for slot in stepping]
        advanced = []
        for plan in self._lineup.hosts:
            admissions = [
                self._admission(plan, slot, group.running[slot], part) for slot, part in group.parts.items()
            ]
            advanced.append(self.hosts[plan.name].submit("advance", at, admissions, stepping, tokens))
        slots = [slot for slot in sorted(group.running) if not group.is_filling_after(slot)]
        return Call(at, slots, advanced, self._ask(at, group, slots) if slots else None)

    def outcomes(self, call: Call, rows: Sequence[RunningRow]) -> list[TokenOutcome]:
        """What the step gave each row; waits for the hosts. Raises HostError."""
        for reply in call.advanced:
            self._wait(reply)
        if call.answer is None:
            return []
        answer = self._wait(call.answer)
        if self._is_alone:
            outcomes: list[TokenOutcome] = answer
            return outcomes
        rewards = self._gather_rewards(call, rows, answer)
        started_s = time.perf_counter()
        played = play(self._decoding, answer, rewards, [row.terms for row in rows], [row.uniform for row in rows])
        self.solve_s += time.perf_counter() - started_s
        return played

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

    def _ask(self, at: Position, group: Group, slots: Sequence[int]) -> Reply:
        """Ask for the tokens themselves where one host holds every role, for candidates elsewhere."""
        base = self.hosts[BASE]
        if self._is_alone:
            rows = [group.running[slot] for slot in slots]
            return base.submit("play", at, slots, [row.terms for row in rows], [row.uniform for row in rows])
        return base.submit(
            "propose", at, slots, num_candidates=num_candidates(self._decoding), min_p=self._decoding.min_p
        )

    def _admission(self, plan: HostPlan, slot: int, running: RunningRow, part: int) -> Admission:
        """A part of the row's prompts, with the tokens that it kept if it is admitted again."""
        prompts = self._prompts_for(plan.name, running)
        is_last = part + 1 == running.num_parts
        if plan.scorings:
            return Admission(slot, prompts, part=part, is_last=is_last, answer=running.tokens)
        prompts = {role: [*prompt, *running.tokens] for role, prompt in prompts.items()}
        return Admission(slot, prompts, running.heads, part, is_last)

    def _prompts_for(self, host: str, running: RunningRow) -> dict[str, Sequence[int]]:
        return {name: running.prompts[name] for name, role in self._lineup.roles.items() if role.host == host}

    def _gather_rewards(self, call: Call, rows: Sequence[RunningRow], proposal: Candidates) -> list[Tensor]:
        """Every principal's q [B, K] in nats at the candidates, from all hosts at once."""
        base, *others = self._lineup.hosts
        num_tokens = [len(running.tokens) for running in rows]
        replies: list[Reply] = []
        for plan in others:
            host = self.hosts[plan.name]
            if plan.scorings:
                replies.append(ask_rewards(host, plan.scorings, call.at, call.slots, num_tokens, proposal))
            else:
                replies.append(host.submit("logprobs_at", call.at, call.slots, proposal.ids_BK))
        logprobs_BK = by_role(base.roles, proposal.role_logprobs_BRK)
        for plan, reply in zip(others, replies, strict=True):
            logprobs_BK |= by_role(plan.roles, self._wait(reply))
        return token_rewards(self._lineup.principals, logprobs_BK)

    def _wait(self, reply: Reply) -> Any:
        started_s = time.perf_counter()
        answer = reply.result()
        self.wait_s += time.perf_counter() - started_s
        return answer
