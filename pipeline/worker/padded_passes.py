"""Roles of one model over the batch of `generate`, with caches of their own.

Where the model's family is decoded in slots, that is one padded forward pass per step. Others keep states, or read
positions from the pass as a whole: padding would change them, so every row of every role has passes of its own.

B rows, R roles, K candidates, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.hub.families import SLOTS, family_named, why_layers_differ, why_not_in_slots
from pipeline.hub.model_facts import as_mapping
from pipeline.worker.plain_runner import PlainPasses
from pipeline.worker.token_holes import without_holes


class RolePasses(Protocol):
    """Reads every role's own prompt of each row, then the tokens that all roles share."""

    def start(self, prompts: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Begin a batch: read the rows' prompts, given by role name."""

    def append(self, tokens_B: Tensor) -> None:
        """Read one token of each row, in all roles."""

    def logprobs_at(self, ids_BK: Tensor) -> dict[str, Tensor]:
        """Log-probabilities [B, K] in nats of these tokens as the next, by role name."""


def role_passes(
    model: Any, roles: Sequence[str], *, vocab_size: int, pad_id: int, holes: Sequence[int] = ()
) -> RolePasses:
    """How to run roles of a model.

    Args:
        model: a causal LM of transformers.
        roles: names of the roles; the batch has all rows for each of them.
        vocab_size: logits beyond it are cut.
        pad_id: any token id; padding is masked.
        holes: ids that no token has.
    """
    family = family_named(model.config.model_type)
    config = as_mapping(model.config)
    is_plain_attention = why_not_in_slots(config) is None and why_layers_differ(config) is None
    if family is not None and family.decoding == SLOTS and is_plain_attention:
        return PaddedPasses(model, roles, vocab_size=vocab_size, pad_id=pad_id, holes=holes)
    return LonePasses(model, roles, vocab_size=vocab_size, holes=holes)


class LonePasses:
    """Runs each row of each role by itself (`RolePasses`).

    Args:
        model: a causal LM of transformers.
        roles: names of the roles.
        vocab_size: logits beyond it are cut.
        holes: ids that no token has.
    """

    def __init__(self, model: Any, roles: Sequence[str], *, vocab_size: int, holes: Sequence[int] = ()) -> None:
        self._holes = list(holes)
        self._passes = PlainPasses(model)
        self._roles = tuple(roles)
        self._vocab_size = vocab_size

    def start(self, prompts: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Begin a batch: read the rows' prompts, given by role name."""
        begun = [self._passes.begin(prompt[role], None) for role in self._roles for prompt in prompts]
        self._rows = [row for row, _ in begun]
        self._logits = torch.stack([logits_V for _, logits_V in begun])

    def append(self, tokens_B: Tensor) -> None:
        """Read one token of each row, in all roles."""
        tokens = tokens_B.tolist() * len(self._roles)
        self._logits = torch.stack(
            [self._passes.append(row, token, None) for row, token in zip(self._rows, tokens, strict=True)]
        )

    def logprobs_at(self, ids_BK: Tensor) -> dict[str, Tensor]:
        """Log-probabilities [B, K] in nats of these tokens as the next, by role name."""
        logits = without_holes(self._logits[:, : self._vocab_size], self._holes)
        return _at_candidates(logits, self._roles, ids_BK.to(self._passes.device))


class PaddedPasses:
    """Runs all rows of all roles in one pass, padded on the left as `generate` pads them (`RolePasses`).

    Args:
        model: a causal LM of transformers.
        roles: names of the roles; the batch has all rows for each of them.
        vocab_size: logits beyond it are cut.
        pad_id: any token id; padding is masked.
        holes: ids that no token has.
    """

    def __init__(
        self, model: Any, roles: Sequence[str], *, vocab_size: int, pad_id: int, holes: Sequence[int] = ()
    ) -> None:
        self._holes = list(holes)
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
        return _at_candidates(self._logits, self._roles, ids_BK.to(self._device))

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
        self._logits = without_holes(output.logits[:, -1, : self._vocab_size].float(), self._holes)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T] each."""
    longest = max(map(len, sequences))
    ids = [[pad_id] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _at_candidates(logits_RBV: Tensor, roles: Sequence[str], ids_BK: Tensor) -> dict[str, Tensor]:
    """Log-probabilities [B, K] by role, of logits of all rows of the first role, then of the next one."""
    logprobs_RBV = logits_RBV.log_softmax(-1).view(len(roles), len(ids_BK), -1)
    at_RBK = ids_BK.expand(len(roles), -1, -1)
    return dict(zip(roles, logprobs_RBV.gather(-1, at_RBK), strict=True))
