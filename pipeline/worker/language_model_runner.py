"""A host: one set of weights on one device, serving every role that shares them in one forward pass.

It holds the slot cache and the newest logits of each (slot, role) on its device; only candidates and the values at
them leave it. A step is one forward pass: prompts of new rows are computed along with the newest tokens of running
rows, except for what some cache row holds already, which is copied.

B rows of a call, R roles of the host, K candidates, V vocabulary, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.prefixes import Prefixes, Prompt
from pipeline.attention.segments import Copied
from pipeline.attention.slots import SlotCache
from pipeline.protocol.messages import CHUNK, Admission, Candidates, HostRole
from pipeline.worker.adapters import TokenAdapters
from pipeline.worker.forward_batch import Draft
from pipeline.worker.forward_passes import Passes
from pipeline.worker.memory import Room, capacity_for

BLOCK = 64  # tokens
LOGITS_COPIES = 4  # the newest ones, and those of a step while candidates are found


class Host:
    """Runs one model for `num_slots` rows and several roles.

    Args:
        model: a causal LM in eval mode with the slot attention.
        roles: what it serves. The first is the base's, where the host is the base's.
        num_slots: rows at once.
        vocab_size: number of token ids that all models share; logits beyond it are cut.
        adapters: of the model, where a role has one.
        strict: attend row by row and pad small passes, so that no row's bits depend on its company.
        bytes_per_token: what one token of one row takes in the cache.
        has_static_steps: see `Passes`.
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
        bytes_per_token: int = 0,
        has_static_steps: bool | None = None,
    ) -> None:
        self._bytes_per_token = bytes_per_token
        self._roles = tuple(roles)
        self._vocab_size = vocab_size
        self._passes = Passes(
            model,
            vocab_size=vocab_size,
            adapters=adapters,
            strict=strict,
            has_static_steps=has_static_steps,
        )
        self._lay_out(num_slots)

    def room(self, row_tokens: int) -> Room:
        """What a slot takes with rows of `row_tokens` tokens, passes included, and what is free."""
        logits_bytes = LOGITS_COPIES * self._vocab_size * torch.float32.itemsize
        slot_bytes = len(self._roles) * (capacity_for(row_tokens) * self._bytes_per_token + logits_bytes)
        return Room.on(self._passes.device, slot_bytes)

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""
        self._passes.let_go()
        # before the new ones are made: this is asked for when memory is short
        del self._cache, self._logits_RV, self._padded_RV, self.newest_S
        if self._passes.device.type == "cuda":
            torch.cuda.empty_cache()
        self._lay_out(num_slots)

    def _lay_out(self, num_slots: int) -> None:
        self._num_slots = num_slots
        num_rows = len(self._roles) * num_slots
        # one more row takes the writes of padding
        self._cache = SlotCache(num_rows + 1)
        adapters = [role.adapter for role in self._roles for _ in range(num_slots)]
        self._passes.lay_out(self._cache, [*adapters, None])
        self._lengths = [0] * num_rows + [1]
        self._prefixes: Prefixes[int] = Prefixes()
        # of rows that are being filled: the tokens they have, and the row with the same prompt that is a step ahead
        self._filled: dict[int, int] = {}
        self._following: dict[int, tuple[int, int]] = {}
        # in rows of whole blocks: the order in which a GPU adds up depends on where in memory a row begins
        width = -(-self._vocab_size // BLOCK) * BLOCK
        self._padded_RV = torch.full((num_rows + 1, width), -torch.inf, device=self._passes.device)
        self._logits_RV = self._padded_RV[:, : self._vocab_size]
        self._logits_RV.zero_()
        # the newest token of each slot for which it was drawn on the device
        self.newest_S = torch.zeros(num_slots, dtype=torch.long, device=self._passes.device)
        self._newest_draft = Draft()

    @property
    def device(self) -> torch.device:
        return self._passes.device

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
        """Passes so far."""
        return self._passes.num_forwards

    @property
    def work(self) -> tuple[int, int, float]:
        """Passes so far, tokens that went through them, and the seconds that they took."""
        return self._passes.num_forwards, self._passes.num_tokens, self._passes.forward_s

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes; 0 before the first pass."""
        return self._cache.bytes_per_token()

    @torch.inference_mode()
    def advance(self, admissions: Sequence[Admission], slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Compute parts of new rows' prompts and append one token to each running row, in one forward pass.

        A row whose last part this is gets its first logits, like the running ones. A token may be DRAWN: it is what
        `newest_S` has for the slot.
        """
        draft = Draft()
        try:
            for admission in admissions:
                for index, role in enumerate(self._roles):
                    self._fill(draft, self._row(index, admission.slot), role, admission)
            for index in range(len(self._roles)):
                for slot, token in zip(slots, tokens, strict=True):
                    self._append(draft, index, slot, token)
            self._newest_draft = draft
            self.compute_again()
        except BaseException:
            self._prefixes.clear()  # any row may be half-written
            raise
        for row, prompt in draft.filled:
            self._prefixes.put(row, prompt)

    @torch.inference_mode()
    def compute_again(self) -> None:
        """Run the newest pass, again if one of its tokens was corrected: keys go to the same places."""
        if done := self._passes.run(self._newest_draft, self.newest_S):
            rows_R, logits_RV = done
            self._logits_RV[rows_R] = logits_RV

    @torch.inference_mode()
    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base role's candidates for each slot, most likely first; None proposes the whole vocabulary."""
        if self.device.type == "cpu":
            return propose_from(self._logits(slots), self._vocab_size, num_candidates=num_candidates, min_p=min_p)
        # of all slots: the order in which a GPU adds up depends on how many rows there are, too
        of_all = propose_from(self.slot_logits, self._vocab_size, num_candidates=num_candidates, min_p=min_p)
        return of_all.rows(torch.tensor(slots, device=self.device))

    @property
    def slot_logits(self) -> Tensor:
        """The newest logits [S, R, V] of all slots, V padded with -inf; a view, in which they change."""
        return self._padded_RV[:-1].view(len(self._roles), self._num_slots, -1).transpose(0, 1)

    @torch.inference_mode()
    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        """Log-probabilities [B, R, K] in nats of every role at the candidates."""
        logits_BRV = self._logits(slots)
        if self.device.type == "cpu":
            normaliser_BR1 = logits_BRV.logsumexp(-1, keepdim=True)
        else:  # see `propose`
            normaliser_BR1 = self.slot_logits.logsumexp(-1, keepdim=True)[torch.tensor(slots, device=self.device)]
        if ids_BK is None:
            return logits_BRV - normaliser_BR1
        return _gather(logits_BRV, ids_BK.to(self._passes.device)) - normaliser_BR1

    @torch.inference_mode()
    def score(self, prompts: Mapping[str, Sequence[int]], continuation: Sequence[int]) -> Tensor:
        """Teacher forcing: log-probabilities [R, T] of the continuation's tokens under each role."""
        scores = []
        for role in self._roles:
            tokens = [*prompts[role.name], *continuation]
            logits_TV = self._passes.score(tokens, role.adapter, len(continuation) + 1)
            ids_T1 = torch.tensor(continuation, device=self._passes.device)[:, None]
            logprobs_TV = logits_TV[:-1] - logits_TV[:-1].logsumexp(-1, keepdim=True)
            scores.append(logprobs_TV.gather(-1, ids_T1)[:, 0])
        return torch.stack(scores)

    def _row(self, role: int, slot: int) -> int:
        return role * self._num_slots + slot

    def _fill(self, draft: Draft, row: int, role: HostRole, admission: Admission) -> None:
        """Draft one part of a prompt: what a row holds is copied, the rest computed, all but the last token."""
        prompt = Prompt.of(role.adapter, admission.prompts[role.name], admission.heads.get(role.name, 0))
        length = len(prompt.tokens) - 1
        if admission.part == 0:
            self._begin(draft, row, prompt)
        start = max(admission.part * CHUNK, self._filled[row])
        stop = min((admission.part + 1) * CHUNK, length)
        source, shared = self._following.get(row, (row, 0))
        if start < min(stop, shared) and draft.parts.get(source) == admission.part:
            draft.follows.append(Copied(source, row, start, min(stop, shared)))
            start = min(stop, shared)
        if start < stop:
            draft.compute(row, prompt, start, stop)
        draft.parts[row] = admission.part
        self._filled[row] = max(self._filled[row], stop)
        if admission.is_last:
            draft.filled.append((row, prompt))
            del self._filled[row]
            self._following.pop(row, None)
            self._lengths[row] = length
            draft.append(row, length, prompt.tokens[-1])
            self._lengths[row] += 1

    def _begin(self, draft: Draft, row: int, prompt: Prompt) -> None:
        """Take over the longest part of the prompt that a row holds; follow a row that begins with more of it now."""
        source, held = self._prefixes.find(prompt, preferred=row)
        self._prefixes.drop(row)
        if source != row:
            self._cache.copy(Copied(source, row, 0, held))
        self._filled[row] = held
        self._following.pop(row, None)
        source, shared = draft.begin(row, prompt)
        if shared > held:
            self._following[row] = (source, shared)

    def _append(self, draft: Draft, index: int, slot: int, token: int) -> None:
        row = self._row(index, slot)
        draft.append(row, self._lengths[row], token, slot)
        self._lengths[row] += 1

    def _logits(self, slots: Sequence[int]) -> Tensor:
        """Newest logits [B, R, V] of the slots."""
        rows = [[index * self._num_slots + slot for index in range(len(self._roles))] for slot in slots]
        return self._logits_RV[torch.tensor(rows, device=self._passes.device)]


def propose_from(logits_BRV: Tensor, vocab_size: int, *, num_candidates: int | None, min_p: float) -> Candidates:
    """The candidates of the first role, most likely first; None proposes the whole vocabulary.

    What the logits hold beyond the vocabulary is -inf.
    """
    normaliser_BR1 = logits_BRV.logsumexp(-1, keepdim=True)
    logits_BRV = logits_BRV[..., :vocab_size]
    if num_candidates is None or num_candidates >= vocab_size:
        ids_BK = None
        role_logprobs_BRK = logits_BRV - normaliser_BR1
    else:
        ids_BK = logits_BRV[:, 0].topk(num_candidates, dim=-1).indices
        role_logprobs_BRK = _gather(logits_BRV, ids_BK) - normaliser_BR1
    base_BK = role_logprobs_BRK[:, 0].clone()
    if min_p > 0:
        floor_B1 = base_BK.max(-1, keepdim=True).values + math.log(min_p)
        base_BK = base_BK.masked_fill(base_BK < floor_B1, -torch.inf)
    return Candidates(ids_BK, base_BK, base_BK.exp().sum(-1), role_logprobs_BRK)


def _gather(logits_BRV: Tensor, ids_BK: Tensor) -> Tensor:
    shape = (*logits_BRV.shape[:2], ids_BK.shape[1])
    return logits_BRV.gather(-1, ids_BK[:, None, :].expand(shape))
