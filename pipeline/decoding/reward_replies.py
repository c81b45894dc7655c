"""What the engine asks reward hosts, and their answers as values of all candidates.

B rows, D rows that are due, R roles of a host, N scored candidates, K candidates, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoding.hosts import HostClient, Reply
from pipeline.decoding.lineup import Scoring
from pipeline.models.messages import Candidates, Position


@dataclass(frozen=True, slots=True)
class RewardReply:
    """A reward host's answer on its way: q [B, R, K] in nats. No reply: no row is due."""

    reply: Reply | None
    scorings: Sequence[Scoring]
    num_tokens: Sequence[int]
    due: Sequence[int]
    at_BN: Tensor
    num_candidates: int

    def result(self) -> Tensor:
        shape = (len(self.num_tokens), len(self.scorings), self.num_candidates)
        values_BRK = torch.zeros(shape, device=self.at_BN.device)
        if self.reply is None:
            return values_BRK
        scored_DRN = self.reply.result().to(self.at_BN.device)
        for role, scoring in enumerate(self.scorings):
            due = [at for at, row in enumerate(self.due) if self.num_tokens[row] % scoring.interval == 0]
            rows = [self.due[at] for at in due]
            values_DN = scored_DRN[due, role, : scoring.candidates] * scoring.factor
            # what was not scored counts as the worst that was
            values_DK = values_DN.amin(-1, keepdim=True).repeat(1, self.num_candidates)
            values_BRK[rows, role] = values_DK.scatter(-1, self.at_BN[rows, : scoring.candidates], values_DN)
        return values_BRK


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
    proposal: Candidates,
) -> RewardReply:
    """Ask for the base's likeliest candidates of the rows that are due, `num_tokens` being what they have."""
    num_candidates = proposal.base_logprobs_BK.shape[1]
    num_scored = min(num_candidates, max(scoring.candidates for scoring in scorings))
    at_BN = proposal.base_logprobs_BK.topk(num_scored, dim=-1).indices
    due = [row for row, num in enumerate(num_tokens) if any(num % scoring.interval == 0 for scoring in scorings)]
    reply = None
    if due:
        ids_BN = at_BN if proposal.ids_BK is None else proposal.ids_BK.gather(-1, at_BN)
        reply = host.submit("rewards_at", at, [slots[row] for row in due], ids_BN[due])
    return RewardReply(reply, scorings, num_tokens, due, at_BN, num_candidates)
