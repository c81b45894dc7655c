"""The newest logits of each (slot, role) of a host, and what is asked of them: candidates, and values at them.

B rows of a call, R roles of the host, S slots, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.protocol.messages import Candidates
from pipeline.sampling.proposals import at_candidates, propose_from

BLOCK = 64  # numbers


class NewestLogits:
    """Logits by place: r * S + s is role r of slot s, and one more place is for padding.

    Args:
        num_roles: R.
        num_slots: S; where tokens are proposed, lanes of them count as slots.
        vocab_size: V.
        device: where they are.
    """

    def __init__(self, num_roles: int, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._num_roles, self._num_slots, self._vocab_size = num_roles, num_slots, vocab_size
        self._device = device
        # in rows of whole blocks: a GPU loads aligned rows by other instructions, and then adds in another order
        width = -(-vocab_size // BLOCK) * BLOCK
        self._padded = torch.full((num_roles * num_slots + 1, width), -torch.inf, device=device)
        self._logits = self._padded[:, :vocab_size]
        self._logits.zero_()

    def place(self, role: int, slot: int) -> int:
        """Where the logits of a role of a slot are."""
        return role * self._num_slots + slot

    def put(self, rows: int | Tensor, logits: Tensor) -> None:
        """Replace the logits at some places."""
        self._logits[rows] = logits

    @property
    def by_slot(self) -> Tensor:
        """The newest logits [S, R, V] of all slots, V padded with -inf; a view, in which they change."""
        return self._padded[:-1].view(self._num_roles, self._num_slots, -1).transpose(0, 1)

    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base role's candidates for each slot, most likely first; None proposes the whole vocabulary."""
        if self._device.type == "cpu":
            return propose_from(self._of(slots), self._vocab_size, num_candidates=num_candidates, min_p=min_p)
        # for all slots, whichever are wanted: on a GPU the order of additions depends on the number of rows, too
        of_all = propose_from(self.by_slot, self._vocab_size, num_candidates=num_candidates, min_p=min_p)
        return of_all.rows(torch.tensor(slots, device=self._device))

    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        """Log-probabilities [B, R, K] in nats of every role at the candidates; None: at the whole vocabulary."""
        logits_BRV = self._of(slots)
        if self._device.type == "cpu":
            normaliser_BR1 = logits_BRV.logsumexp(-1, keepdim=True)
        else:  # see `propose`
            normaliser_BR1 = self.by_slot.logsumexp(-1, keepdim=True)[torch.tensor(slots, device=self._device)]
        if ids_BK is None:
            return logits_BRV - normaliser_BR1
        return at_candidates(logits_BRV, ids_BK.to(self._device)) - normaliser_BR1

    def _of(self, slots: Sequence[int]) -> Tensor:
        """Newest logits [B, R, V] of the slots."""
        rows = [[self.place(index, slot) for index in range(self._num_roles)] for slot in slots]
        return self._logits[torch.tensor(rows, device=self._device)]


def answer_logprobs(logits_TV: Tensor, answer: Sequence[int]) -> Tensor:
    """Log-probabilities [T] of an answer's tokens, from the logits that each would be drawn from."""
    ids_T1 = torch.tensor(answer, device=logits_TV.device)[:, None]
    return (logits_TV - logits_TV.logsumexp(-1, keepdim=True)).gather(-1, ids_T1)[:, 0]
