"""Runs one language model for every role that shares its weights, in one forward pass per step.

It holds the slot cache and the newest logits of each (slot, role) on its device; only candidates and the values at
them leave it. A step is one forward pass: prompts of new rows are computed along with the newest tokens of running
rows, except for prefixes that some cache row holds already, which are copied.

B rows of a call, R roles of the host, K candidates, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.prefixes import Prefixes, Prompt
from pipeline.attention.segments import Copied
from pipeline.attention.slots import SlotCache
from pipeline.attention.transfers import to_device
from pipeline.attention.visibility import LayerFacts
from pipeline.protocol.memory import memory_of_host, rows_beside_slots
from pipeline.protocol.messages import (
    CHUNK,
    Admission,
    Candidates,
    Draft,
    MemoryBudget,
    Step,
    most_drafted,
)
from pipeline.protocol.topology import HostRole
from pipeline.worker.adapters import TokenAdapters
from pipeline.worker.forward_batch import ForwardBatch
from pipeline.worker.forward_passes import Passes
from pipeline.worker.memory import budget_of
from pipeline.worker.newest_logits import NewestLogits


class LanguageModelRunner:
    """Runs one model for `num_slots` rows and several roles.

    A call that raises may leave any row half-written; its host then forgets all positions.

    Args:
        model: a causal LM in eval mode with the slot attention.
        roles: what it serves. The first is the base's, where the host is the base's.
        num_slots: rows at once.
        vocab_size: number of token ids that all models share; logits beyond it are cut.
        adapters: of the model, where a role has one.
        strict: attend row by row and pad small passes, so that no row's bits depend on the batch composition.
        bytes_per_token: what one token of one row takes in the cache, by device.
        has_fixed_shapes: see `Passes`.
        layers: see `Passes`.
        needs_whole_vectors: see `Passes`.
        drafts: whether to verify proposed tokens. Where passes have fixed shapes there is room for them in any case:
            otherwise bits would differ with drafts and without.

    Attributes:
        newest_S: by slot and lane of proposed tokens, the newest token that was drawn on the device.
    """

    def __init__(
        self,
        model: Any,
        roles: Sequence[HostRole],
        *,
        num_slots: int,
        vocab_size: int,
        adapters: TokenAdapters | None = None,
        strict: bool = True,
        bytes_per_token: Mapping[torch.device, int] = MappingProxyType({}),
        has_fixed_shapes: bool | None = None,
        layers: Sequence[LayerFacts] = (),
        needs_whole_vectors: bool = False,
        drafts: bool = False,
    ) -> None:
        self._bytes_per_token = bytes_per_token
        self._roles = tuple(roles)
        self._vocab_size = vocab_size
        self._adapters = adapters
        self._passes = Passes(
            model,
            vocab_size=vocab_size,
            adapters=adapters,
            strict=strict,
            has_fixed_shapes=has_fixed_shapes,
            layers=layers,
            needs_whole_vectors=needs_whole_vectors,
        )
        # on a GPU kernels depend on the shape of a pass: without a fixed one drafts would change bits
        self._drafts = drafts and (self._passes.device.type == "cpu" or self._passes.has_fixed_shapes)
        self._lay_out(num_slots)

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of `row_tokens` tokens, passes included, and what is free."""
        memory_of = partial(
            memory_of_host,
            self._passes.sizes,
            num_roles=len(self._roles),
            row_tokens=row_tokens,
            num_more_rows=rows_beside_slots(
                len(self._roles), has_fixed_shapes=self._passes.has_fixed_shapes, drafts=self._drafts
            ),
            device_type=self._passes.device.type,
        )
        budget = budget_of(self._passes.devices, memory_of, bytes_per_token=self._bytes_per_token)
        return replace(budget, verifies_drafts=self._drafts, rows_of_slot=self._rows_of_slot)

    @property
    def _rows_of_slot(self) -> int:
        return len(self._roles) if self._passes.has_fixed_shapes else 0

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""
        self._passes.let_go()
        # before the new ones are allocated: this is called when memory is short
        del self._cache, self._logits, self.newest_S
        if self._passes.device.type == "cuda":
            torch.cuda.empty_cache()
        self._lay_out(num_slots)

    def _lay_out(self, num_slots: int) -> None:
        self._num_slots = num_slots
        num_rows = len(self._roles) * num_slots
        # one more row, to which padding is written
        self._cache = SlotCache(num_rows + 1)
        adapters = [role.adapter for role in self._roles for _ in range(num_slots)]
        self._passes.lay_out(self._cache, [*adapters, None], may_follow=self._drafts)
        self._lengths = [0] * num_rows + [1]
        self._prefixes: Prefixes[int] = Prefixes()
        # of rows whose prompt is being computed: how many tokens they have, and the row whose prefix they copy part
        # by part as it is computed
        self._filled: dict[int, int] = {}
        self._copies_from: dict[int, tuple[int, int]] = {}
        num_outputs = num_slots
        if self._drafts or self._passes.has_fixed_shapes:
            num_outputs += most_drafted(num_slots, self._rows_of_slot)
        self._logits = NewestLogits(len(self._roles), num_outputs, self._vocab_size, self._passes.device)
        # the newest token of each slot for which it was drawn on the device
        self.newest_S = torch.zeros(num_outputs, dtype=torch.long, device=self._passes.device)
        self._newest_batch = ForwardBatch()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._passes.device

    @property
    def passes(self) -> Passes:
        """What runs the model."""
        return self._passes

    @property
    def vocab_size(self) -> int:
        """Token ids that all models share."""
        return self._vocab_size

    @property
    def num_slots(self) -> int:
        """Rows at once."""
        return self._num_slots

    @property
    def num_forwards(self) -> int:
        """Forward passes so far."""
        return self._passes.num_forwards

    @property
    def work(self) -> tuple[int, int, float]:
        """Passes so far, tokens that went through them, and the seconds that they took."""
        return self._passes.num_forwards, self._passes.num_tokens, self._passes.forward_s

    @property
    def cache_bytes(self) -> int:
        """Bytes that its rows take in memory."""
        return self._cache.num_bytes

    @property
    def cache_bytes_per_token(self) -> Counter[torch.device]:
        """Bytes per token of one row, by device; none before the first pass."""
        return self._cache.bytes_per_token()

    @torch.inference_mode()
    def advance(self, step: Step) -> None:
        """Compute parts of new rows' prompts and append one token to each running row, in one forward pass.

        A row whose last part this is gets its first logits, like the running ones. A token may be DRAWN: it is what
        `newest_S` has for the slot. Proposed tokens are computed behind a row's newest one and are no part of it: the
        next step says which of them it keeps, and their keys are in their places already.
        """
        batch = ForwardBatch()
        try:
            for admission in step.admissions:
                for index, role in enumerate(self._roles):
                    self._fill(batch, index, role, admission)
            for index in range(len(self._roles)):
                for slot, token in zip(step.slots, step.tokens, strict=True):
                    self._lengths[self._row(index, slot)] += step.accepted.get(slot, 0)
                    self._append(batch, index, slot, token)
                for draft in step.drafts:
                    self._verify(batch, index, draft)
            self._newest_batch = batch
            self.compute_again()
        except BaseException:
            self._prefixes.clear()  # any row may be half-written
            raise
        for row, prompt in batch.filled:
            self._prefixes.put(row, prompt)

    @torch.inference_mode()
    def compute_again(self) -> None:
        """Run the newest pass, again if one of its tokens was corrected: keys go to the same places."""
        logits_RV = self._passes.run(self._newest_batch, self.newest_S)
        if logits_RV is not None:
            self._logits.put(to_device(self._newest_batch.outputs, self._passes.device, torch.long), logits_RV)

    @torch.inference_mode()
    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base role's candidates for each slot, most likely first; None proposes the whole vocabulary."""
        return self._logits.propose(slots, num_candidates=num_candidates, min_p=min_p)

    @property
    def slot_logits(self) -> Tensor:
        """The newest logits [S, R, V] of all slots, V padded with -inf; a view, in which they change."""
        return self._logits.by_slot

    @torch.inference_mode()
    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        """Log-probabilities [B, R, K] in nats of every role at the candidates."""
        return self._logits.logprobs_at(slots, ids_BK)

    @torch.inference_mode()
    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """Teacher forcing: log-probabilities [R, T] of the answer's tokens under each role."""
        scores = []
        for role in self._roles:
            tokens = [*prompts[role.name], *answer]
            preference = self._preference(role, weights)
            logits_TV = self._passes.score(tokens, role.adapter, len(answer) + 1, preference)
            ids_T1 = torch.tensor(answer, device=self._passes.device)[:, None]
            logprobs_TV = logits_TV[:-1] - logits_TV[:-1].logsumexp(-1, keepdim=True)
            scores.append(logprobs_TV.gather(-1, ids_T1)[:, 0])
        return torch.stack(scores)

    def _preference(self, role: HostRole, weights: Sequence[float]) -> list[float] | None:
        return None if self._adapters is None else self._adapters.preference(role, weights)

    def _row(self, role: int, slot: int) -> int:
        return role * self._num_slots + slot

    def _fill(self, batch: ForwardBatch, index: int, role: HostRole, admission: Admission) -> None:
        """Add one part of a prompt to the batch: what is cached is copied, the rest is computed.

        The last token of a prompt is appended like the newest token of a running row, in the pass with its last part.
        """
        row = self._row(index, admission.slot)
        prompt = Prompt.of(
            role.adapter,
            [*admission.prompts[role.name], *admission.answer],
            admission.shared_prefixes.get(role.name, 0),
            weights=admission.weights if role.takes_weights else (),
        )
        length = len(prompt.tokens) - 1
        if admission.part == 0:
            self._passes.prefer(row, self._preference(role, admission.weights))
            self._begin(batch, row, prompt)
        start = max(admission.part * CHUNK, self._filled[row])
        stop = min((admission.part + 1) * CHUNK, length)
        source, shared = self._copies_from.get(row, (row, 0))
        if start < min(stop, shared) and batch.parts.get(source) == admission.part:
            batch.prefix_copies.append(Copied(source, row, start, min(stop, shared)))
            start = min(stop, shared)
        if start < stop:
            batch.compute(row, prompt, start, stop)
        batch.parts[row] = admission.part
        self._filled[row] = max(self._filled[row], stop)
        if admission.is_last:
            batch.filled.append((row, prompt))
            del self._filled[row]
            self._copies_from.pop(row, None)
            self._lengths[row] = length
            batch.append(row, length, prompt.tokens[-1], self._logits.place(index, admission.slot))
            self._lengths[row] += 1

    def _begin(self, batch: ForwardBatch, row: int, prompt: Prompt) -> None:
        """Copy the longest cached prefix. Where a row of this batch begins with a longer one, that is copied part by
        part as it is computed."""
        source, held = self._prefixes.find(prompt, preferred=row)
        self._prefixes.drop(row)
        if source != row:
            self._cache.copy(Copied(source, row, 0, held))
        self._filled[row] = held
        self._copies_from.pop(row, None)
        source, shared = batch.begin(row, prompt)
        if shared > held:
            self._copies_from[row] = (source, shared)

    def _append(self, batch: ForwardBatch, index: int, slot: int, token: int) -> None:
        row = self._row(index, slot)
        batch.append(row, self._lengths[row], token, self._logits.place(index, slot), slot)
        self._lengths[row] += 1

    def _verify(self, batch: ForwardBatch, index: int, draft: Draft) -> None:
        """Compute proposed tokens behind a row's newest one."""
        row = self._row(index, draft.slot)
        for at, (token, lane) in enumerate(zip(draft.tokens, draft.lanes, strict=True), self._lengths[row]):
            batch.append(row, at, token, self._logits.place(index, lane), draft.slot)
