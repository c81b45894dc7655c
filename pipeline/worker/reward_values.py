"""From the scores of some candidates to the rewards of all candidates of all rows.

B rows, D rows that are due, R roles of a host, N scored candidates, K candidates, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.protocol.messages import Candidates
from pipeline.protocol.topology import Scoring


def due_rows(scorings: Sequence[Scoring], num_tokens: Sequence[int]) -> list[int]:
    """The rows that some role scores at this token, by the number of tokens that each has drawn."""
    return [row for row, num in enumerate(num_tokens) if any(num % scoring.interval == 0 for scoring in scorings)]


def spread_rewards(
    scored: tuple[Tensor, Tensor] | None,
    scorings: Sequence[Scoring],
    num_tokens: Sequence[int],
    proposal: Candidates,
) -> Tensor:
    """Rewards [B, R, K] in nats of all candidates.

    Args:
        scored: places [D, N] of the scored candidates among a row's K, and what each adds to the score [D, R, N];
            None: no row was due.
        scorings: of the roles.
        num_tokens: drawn so far, by row.
        proposal: the candidates.
    """
    num_rows, num_candidates = proposal.base_logprobs_BK.shape
    values_BRK = proposal.base_logprobs_BK.new_zeros(num_rows, len(scorings), num_candidates)
    if scored is None:
        return values_BRK
    at_DN, scored_DRN = (each.to(values_BRK.device) for each in scored)
    all_due = due_rows(scorings, num_tokens)
    for role, scoring in enumerate(scorings):
        due = [at for at, row in enumerate(all_due) if num_tokens[row] % scoring.interval == 0]
        values_DN = scored_DRN[due, role, : scoring.candidates] * scoring.factor
        # a candidate that was not scored gets the lowest reward of the scored ones: a reward model must not favour
        # what it has not seen
        values_DK = values_DN.amin(-1, keepdim=True).repeat(1, num_candidates)
        rows = [all_due[at] for at in due]
        values_BRK[rows, role] = values_DK.scatter(-1, at_DN[due, : scoring.candidates], values_DN)
    return values_BRK


def rewards_of_answer(scores_RT: Tensor, scorings: Sequence[Scoring]) -> Tensor:
    """Rewards [R, T] in nats of an existing answer's tokens, from what each token adds to each role's score."""
    rewards_RT = scores_RT.clone()
    at_T = torch.arange(rewards_RT.shape[1], device=rewards_RT.device)
    for rewards_T, scoring in zip(rewards_RT, scorings, strict=True):
        rewards_T.mul_(scoring.factor).masked_fill_(at_T % scoring.interval != 0, 0.0)
    return rewards_RT
