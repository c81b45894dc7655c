"""A host: one set of weights on one device, serving every role that shares them in one forward pass.

It holds the slot cache and the newest logits of each (slot, role) on its device; only candidates and the values at
them leave it. B rows of a call, R roles of the host, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.models.messages import Admission, Candidates, HostRole
from pipeline.models.slots import SlotCache, SlotPass, running

MIN_ROWS = 4  # matrix kernels treat fewer rows differently: pad, or a row's bits depend on its company
BACKBONE = "__base__"  # peft's name for "no adapter" in a mixed batch


class Host:
    """Runs one model for `num_slots` rows and several roles.

    Args:
        model: a causal LM in eval mode with the slot attention; a PeftModel where a role has an adapter.
        roles: what it serves. The first is the base's, where the host is the base's.
        num_slots: rows at once.
        vocab_size: number of token ids that all models share; logits beyond it are cut.
        strict: attend row by row and pad small passes, so that no row's bits depend on its company.
    """

    def __init__(
        self,
        model: Any,
        roles: Sequence[HostRole],
        *,
        num_slots: int,
        vocab_size: int,
        strict: bool = True,
    ) -> None:
        self._model = model
        self._roles = tuple(roles)
        self._vocab_size = vocab_size
        self._strict = strict
        self._device = next(model.parameters()).device
        self._mixes_adapters = any(role.adapter is not None for role in roles)
        self.num_forwards = 0
        self._lay_out(num_slots)

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""
        del self._cache, self._logits_RV  # before the new ones are made: this is asked for when memory is short
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._lay_out(num_slots)

    def _lay_out(self, num_slots: int) -> None:
        self._num_slots = num_slots
        num_rows = len(self._roles) * num_slots
        # one more row takes the writes of padding
        self._cache = SlotCache(num_rows + 1)
        self._lengths = [0] * num_rows + [1]
        self._logits_RV = torch.zeros(num_rows + 1, self._vocab_size, device=self._device)

    @torch.inference_mode()
    def advance(self, admissions: Sequence[Admission], slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Prefill the new rows, then append one token to each running row in one forward pass."""
        for admission in admissions:
            for index, role in enumerate(self._roles):
                self._prefill(index * self._num_slots + admission.slot, role, admission.prompts[role.name])
        if slots:
            self._decode(slots, tokens)

    @torch.inference_mode()
    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base role's candidates for each slot, most likely first; None proposes the whole vocabulary."""
        logits_BRV = self._logits(slots)
        normaliser_BR1 = logits_BRV.logsumexp(-1, keepdim=True)
        if num_candidates is None or num_candidates >= self._vocab_size:
            ids_BK = None
            role_logprobs_BRK = logits_BRV - normaliser_BR1
        else:
            ids_BK = logits_BRV[:, 0].topk(num_candidates, dim=-1).indices
            role_logprobs_BRK = _gather(logits_BRV, ids_BK) - normaliser_BR1
        base_BK = role_logprobs_BRK[:, 0].clone()
        if min_p > 0:
            floor_B1 = base_BK.max(-1, keepdim=True).values + torch.tensor(min_p, device=self._device).log()
            base_BK = base_BK.masked_fill(base_BK < floor_B1, -torch.inf)
        return Candidates(ids_BK, base_BK, base_BK.exp().sum(-1), role_logprobs_BRK)

    @torch.inference_mode()
    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        """Log-probabilities [B, R, K] in nats of every role at the candidates."""
        logits_BRV = self._logits(slots)
        normaliser_BR1 = logits_BRV.logsumexp(-1, keepdim=True)
        if ids_BK is None:
            return logits_BRV - normaliser_BR1
        return _gather(logits_BRV, ids_BK.to(self._device)) - normaliser_BR1

    @torch.inference_mode()
    def score(self, prompts: Mapping[str, Sequence[int]], continuation: Sequence[int]) -> Tensor:
        """Teacher forcing: log-probabilities [R, T] of the continuation's tokens under each role."""
        scores = []
        for role in self._roles:
            tokens = [*prompts[role.name], *continuation]
            logits_TV = self._forward_prompt(tokens, role, None, keep=len(continuation) + 1)[:-1]
            ids_T1 = torch.tensor(continuation, device=self._device)[:, None]
            scores.append((logits_TV.gather(-1, ids_T1) - logits_TV.logsumexp(-1, keepdim=True))[:, 0])
        return torch.stack(scores)

    def _prefill(self, row: int, role: HostRole, tokens: Sequence[int]) -> None:
        self._lengths[row] = len(tokens)
        self._logits_RV[row] = self._forward_prompt(tokens, role, row, keep=1)[0]

    def _forward_prompt(self, tokens: Sequence[int], role: HostRole, row: int | None, keep: int) -> Tensor:
        """One sequence from its start, alone and at its own length; the last `keep` logits [keep, V]."""
        slot_pass = SlotPass(
            cache=self._cache if row is not None else None,
            rows_R=torch.tensor([-1 if row is None else row], device=self._device),
            lengths=(len(tokens),),
            is_prefill=True,
            per_row=self._strict,
        )
        ids = torch.tensor([list(tokens)], device=self._device)
        positions = torch.arange(len(tokens), device=self._device)[None]
        return self._forward(slot_pass, ids, positions, [role.adapter or BACKBONE], keep)[0]

    def _decode(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        rows, ids, adapters = [], [], []
        for index, role in enumerate(self._roles):
            padding = max(0, MIN_ROWS - len(slots)) if self._strict else 0
            rows += [index * self._num_slots + slot for slot in slots] + [len(self._lengths) - 1] * padding
            ids += [*tokens] + [0] * padding
            adapters += [role.adapter or BACKBONE] * (len(slots) + padding)
        for row in rows:
            if row < len(self._lengths) - 1:
                self._lengths[row] += 1
        lengths = tuple(self._lengths[row] for row in rows)
        rows_R = torch.tensor(rows, device=self._device)
        slot_pass = SlotPass(self._cache, rows_R, lengths, is_prefill=False, per_row=self._strict)
        positions = torch.tensor(lengths, device=self._device)[:, None] - 1
        logits_R1V = self._forward(slot_pass, torch.tensor(ids, device=self._device)[:, None], positions, adapters, 1)
        self._logits_RV[rows_R] = logits_R1V[:, 0]

    def _forward(
        self, slot_pass: SlotPass, ids_RT: Tensor, positions_RT: Tensor, adapters: list[str], keep: int
    ) -> Tensor:
        self.num_forwards += 1
        mixed = {"adapter_names": adapters} if self._mixes_adapters else {}
        with running(slot_pass):
            output = self._model(
                input_ids=ids_RT,
                position_ids=positions_RT,
                past_key_values=slot_pass.cache,
                use_cache=slot_pass.cache is not None,
                logits_to_keep=keep,
                **mixed,
            )
        logits: Tensor = output.logits[..., : self._vocab_size].float()
        return logits

    def _logits(self, slots: Sequence[int]) -> Tensor:
        """Newest logits [B, R, V] of the slots."""
        rows = [[index * self._num_slots + slot for index in range(len(self._roles))] for slot in slots]
        return self._logits_RV[torch.tensor(rows, device=self._device)]


def _gather(logits_BRV: Tensor, ids_BK: Tensor) -> Tensor:
    shape = (*logits_BRV.shape[:2], ids_BK.shape[1])
    return logits_BRV.gather(-1, ids_BK[:, None, :].expand(shape))
