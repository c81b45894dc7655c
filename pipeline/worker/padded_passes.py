"""Roles of one model over the batch of `generate`: one forward pass per step, with a cache of its own.

Rows are padded on the left, as `generate` pads them. B rows, R roles, K candidates, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class RolePasses:
    """Reads every role's own prompt of each row, then the tokens that all roles share.

    Args:
        model: a causal LM of transformers.
        roles: names of the roles; the batch has all rows for each of them.
        vocab_size: logits beyond it are cut.
        pad_id: any token id; padding is masked.
    """

    def __init__(self, model: Any, roles: Sequence[str], *, vocab_size: int, pad_id: int) -> None:
        self._model = model
        self._roles = tuple(roles)
        self._vocab_size = vocab_size
        self._pad_id = pad_id
        self._device = next(model.parameters()).device

    def start(self, prompts: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Begin a batch: read the rows' prompts, given by role name."""
        sequences = [prompt[role] for role in self._roles for prompt in prompts]
        ids, self._mask = pad_left(sequences, self._pad_id, self._device)
        self._cache: Any = None
        self._forward(ids, (self._mask.cumsum(-1) - 1).clamp(min=0))

    def append(self, tokens_B: Tensor) -> None:
        """Read one token of each row, in all roles."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], -1)
        ids = tokens_B.to(self._device).repeat(len(self._roles))[:, None]
        self._forward(ids, self._mask.sum(-1, keepdim=True) - 1)

    def logprobs_at(self, ids_BK: Tensor) -> dict[str, Tensor]:
        """Log-probabilities [B, K] in nats of these tokens as the next, by role name."""
        logprobs_RBV = self._logits.log_softmax(-1).view(len(self._roles), len(ids_BK), -1)
        at_RBK = ids_BK.to(self._device).expand(len(self._roles), -1, -1)
        return dict(zip(self._roles, logprobs_RBV.gather(-1, at_RBK), strict=True))

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self._logits = output.logits[:, -1, : self._vocab_size].float()


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T] each."""
    longest = max(map(len, sequences))
    ids = [[pad_id] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
