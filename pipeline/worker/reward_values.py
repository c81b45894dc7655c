"""What the engine asks reward hosts, and their answers as values of all candidates.

B rows, D rows that are due, R roles of a host, N scored candidates, K candidates, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.protocol.clients import Answer, HostClient, Reply
from pipeline.protocol.messages import Candidates, Position, Rewards
from pipeline.runtime.topology import Scoring


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """A reward host's answer about an existing answer: q [R, T] of its tokens, by the same rule as while decoding."""

    reply: Reply
    scorings: Sequence[Scoring]

    def result(self) -> Tensor:
        values_RT: Tensor = self.reply.result().clone()
        at_T = torch.arange(values_RT.shape[1], device=values_RT.device)
        for values_T, scoring in zip(values_RT, self.scorings, strict=True):
            values_T.mul_(scoring.factor).masked_fill_(at_T % scoring.interval != 0, 0.0)
        return values_RT


def ask_rewards(
    host: HostClient,
    scorings: Sequence[Scoring],
    at: Position,
    slots: Sequence[int],
    num_tokens: Sequence[int],
    proposal: Reply,
) -> Reply:
    """Ask for the base's likeliest candidates of the rows that are due, `num_tokens` being what they have."""
    due = rows_due(scorings, num_tokens)
    if not due:
        return Answer()
    num_scored = max(scoring.candidates for scoring in scorings)
    return host.submit("rewards_at", at, [slots[row] for row in due], due, proposal, num_scored)


def rows_due(scorings: Sequence[Scoring], num_tokens: Sequence[int]) -> list[int]:
    """The rows that some role scores at this token."""
    return [row for row, num in enumerate(num_tokens) if any(num % scoring.interval == 0 for scoring in scorings)]


def spread_rewards(
    rewards: Rewards | None, scorings: Sequence[Scoring], num_tokens: Sequence[int], proposal: Candidates
) -> Tensor:
    """q [B, R, K] in nats of all candidates, from those of the rows that were due; None: no row was."""
    num_rows, num_candidates = proposal.base_logprobs_BK.shape
    values_BRK = proposal.base_logprobs_BK.new_zeros(num_rows, len(scorings), num_candidates)
    if rewards is None:
        return values_BRK
    all_due, scored_DRN = rows_due(scorings, num_tokens), rewards.values_DRN.to(values_BRK.device)
    for role, scoring in enumerate(scorings):
        due = [at for at, row in enumerate(all_due) if num_tokens[row] % scoring.interval == 0]
        values_DN = scored_DRN[due, role, : scoring.candidates] * scoring.factor
        # what was not scored counts as the worst that was
        values_DK = values_DN.amin(-1, keepdim=True).repeat(1, num_candidates)
        rows = [all_due[at] for at in due]
        values_BRK[rows, role] = values_DK.scatter(-1, rewards.at_DN[due, : scoring.candidates], values_DN)
    return values_BRK
