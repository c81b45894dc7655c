"""Runs a model with recurrent layers (linear attention, SSMs, short convolutions) for roles that share its weights.

A cache row, one per (slot, role), owns states beside keys and values. All running rows append their tokens in one
pass; prompts are read one row at a time. A state cannot be cut back as keys can, so a prompt goes on from where
another row has read the same tokens only at boundaries that were kept: the newest shared prefix and the newest whole
prompt of each role. Their rows never run.

R roles of the host, B rows of a call, K candidates, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.attention.prefixes import Key, Prompt
from pipeline.protocol.memory import memory_of_host
from pipeline.protocol.messages import CHUNK, Admission, Candidates, MemoryBudget, Step
from pipeline.protocol.topology import HostRole
from pipeline.worker.memory import budget_of
from pipeline.worker.newest_logits import NewestLogits, answer_logprobs
from pipeline.worker.recurrent_passes import RecurrentPasses, RunningBatch

NUM_KEPT = 2  # rows of each role that hold a shared prefix and a whole prompt


@dataclass(frozen=True, slots=True)
class RowBytes:
    """What a cache row takes, by device.

    Args:
        per_token: keys and values.
        states: whatever the length.
    """

    per_token: Mapping[torch.device, int]
    states: Mapping[torch.device, int]


class RecurrentRunner:
    """Runs one model for `num_slots` rows and several roles (`LanguageRunner`).

    A call that raises may leave any row half-written; its host then forgets all positions.

    Args:
        passes: of the model; it belongs to this runner from now on.
        roles: what it serves. The first is the base's, where the host is the base's.
        num_slots: rows at once.
        vocab_size: number of token ids that all models share; logits beyond it are cut.
        row_bytes: what a row takes in the cache.
        reads_parts: whether the model goes on with several tokens from a state, as reading a prompt in parts does;
            otherwise every prompt is read whole, and only whole ones are kept.

    Attributes:
        newest_S: by slot, the newest token that was drawn on the device.
    """

    def __init__(
        self,
        passes: RecurrentPasses,
        roles: Sequence[HostRole],
        *,
        num_slots: int,
        vocab_size: int,
        row_bytes: RowBytes | None = None,
        reads_parts: bool = True,
    ) -> None:
        self._passes = passes
        self._roles = tuple(roles)
        self._vocab_size = vocab_size
        self._row_bytes = row_bytes or RowBytes({}, {})
        self._reads_parts = reads_parts
        self._lay_out(num_slots)

    def _lay_out(self, num_slots: int) -> None:
        self._num_slots = num_slots
        num_rows = len(self._roles) * num_slots
        running = [role.adapter for role in self._roles for _ in range(num_slots)]
        kept = [role.adapter for role in self._roles for _ in range(NUM_KEPT)]
        # behind the kept rows one more, to which padding is written
        self._passes.lay_out(num_rows, [*running, *kept, None])
        self._first_kept = num_rows
        # what the kept rows hold, by role: first its whole prompt, then its shared prefix
        self._kept: list[Key | None] = [None] * len(kept)
        self._lengths = [0] * num_rows
        # rows whose prompt is being read, and how many of its tokens they have read
        self._reading: dict[int, tuple[Prompt, int]] = {}
        self._logits = NewestLogits(len(self._roles), num_slots, self._vocab_size, self.device)
        self.newest_S = torch.zeros(num_slots, dtype=torch.long, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._passes.device

    @property
    def work(self) -> tuple[int, int, float]:
        """Passes so far, tokens that went through them, and the seconds that they took."""
        return self._passes.num_forwards, self._passes.num_tokens, self._passes.forward_s

    @property
    def cache_bytes(self) -> int:
        """Bytes that its rows take in memory."""
        return self._passes.cache_bytes

    @property
    def cache_bytes_per_token(self) -> Counter[torch.device]:
        """Bytes per token of one row, by device; none before the first pass."""
        return self._passes.cache_bytes_per_token

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of so many tokens, states included, and what is free beside kept rows."""
        memory_of = partial(
            memory_of_host,
            self._passes.sizes,
            num_roles=len(self._roles),
            row_tokens=row_tokens,
            num_kept=len(self._kept),
            device_type=self.device.type,
        )
        row = self._row_bytes
        return budget_of(self._passes.devices, memory_of, bytes_per_token=row.per_token, bytes_per_row=row.states)

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""
        # before the new ones are allocated: this is called when memory is short
        self._passes.let_go()
        del self._logits, self.newest_S
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._lay_out(num_slots)

    @torch.inference_mode()
    def advance(self, step: Step) -> None:
        """Read parts of new rows' prompts, then append one token to each running row in one pass.

        A row whose last part this is gets its first logits, like the running ones. A token may be DRAWN: it is what
        `newest_S` has for the slot.
        """
        batch = RunningBatch()
        try:
            for admission in step.admissions:
                for index, role in enumerate(self._roles):
                    self._read(batch, index, role, admission)
            for index in range(len(self._roles)):
                for slot, token in zip(step.slots, step.tokens, strict=True):
                    self._append(batch, self._row(index, slot), token, slot)
            if batch.rows:
                self._logits.put(*self._passes.append(batch, self.newest_S))
        except BaseException:
            self._kept = [None] * len(self._kept)  # any row may be half-written
            self._reading.clear()
            raise

    @torch.inference_mode()
    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base role's candidates for each slot, most likely first; None proposes the whole vocabulary."""
        return self._logits.propose(slots, num_candidates=num_candidates, min_p=min_p)

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
            prompt = prompts[role.name]
            logits_TV = self._passes.score([*prompt, *answer[:-1]], role.adapter)[len(prompt) - 1 :]
            scores.append(answer_logprobs(logits_TV, answer))
        return torch.stack(scores)

    def _row(self, role: int, slot: int) -> int:
        return role * self._num_slots + slot

    def _append(self, batch: RunningBatch, row: int, token: int, slot: int) -> None:
        self._lengths[row] += 1
        batch.append(row, self._lengths[row], token, slot)

    def _read(self, batch: RunningBatch, index: int, role: HostRole, admission: Admission) -> None:
        """Read one part of a prompt: what was kept is copied, the rest is computed.

        The last token of a prompt is appended like the newest token of a running row, in the step of its last part.
        """
        if not (self._reads_parts or admission.is_last):
            return
        prompt = Prompt.of(
            role.adapter,
            [*admission.prompts[role.name], *admission.answer],
            admission.shared_prefixes.get(role.name, 0) if self._reads_parts else 0,
            weights=admission.weights if role.takes_weights else (),
        )
        row = self._row(index, admission.slot)
        length = len(prompt.tokens) - 1
        num_read, stop = 0, length
        if self._reads_parts:
            num_read = 0 if admission.part == 0 else self._reading[row][1]
            stop = min((admission.part + 1) * CHUNK, length)
        num_read = self._take_over(row, prompt, num_read, stop)
        for start, end in prompt.segments(num_read, stop) if num_read < stop else ():
            self._passes.read(row, prompt.tokens[start:end], start)
            self._keep(row, index, prompt, end)
        self._reading[row] = prompt, max(num_read, stop)
        if admission.is_last:
            del self._reading[row]
            self._lengths[row] = length
            if length:
                self._append(batch, row, prompt.tokens[-1], admission.slot)
            else:  # it has no state to go on from
                self._lengths[row] = 1
                self._logits.put(row, self._passes.read(row, prompt.tokens, 0))

    def _take_over(self, row: int, prompt: Prompt, num_read: int, stop: int) -> int:
        """Copy what another row has read further of the same tokens; how many tokens the row has read then."""
        for key in prompt.keys:
            held = len(key.tokens)
            for kept, kept_key in enumerate(self._kept):  # of any role with the same adapter
                if held > num_read and kept_key == key:
                    self._passes.copy(self._first_kept + kept, row, num_read, held)
                    return held
        # a long prompt that several new rows begin together is read part by part, and no part is kept
        for other, (same, reached) in self._reading.items():
            if other != row and reached == stop > num_read and same == prompt:
                self._passes.copy(other, row, num_read, stop)
                return stop
        return num_read

    def _keep(self, row: int, index: int, prompt: Prompt, num_read: int) -> None:
        """Keep what the row has read, where that is its whole prompt or a prefix that others may share."""
        for at, key in enumerate(prompt.keys):
            kept = index * NUM_KEPT + at
            if len(key.tokens) == num_read and self._kept[kept] != key:
                self._kept[kept] = None
                self._passes.copy(row, self._first_kept + kept, 0, num_read)
                self._kept[kept] = key
