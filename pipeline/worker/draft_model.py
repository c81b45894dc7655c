"""The model that proposes tokens: one pass for the next token of many texts, with the draw of each one's own step.

It takes the draw that the game will take: from its own distribution over its own candidates, the likeliest first. The
nearer that is to the game's policy, the more often both draw the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from pipeline.attention.prefixes import Prompt
from pipeline.attention.segments import Copied
from pipeline.attention.slots import SlotCache
from pipeline.attention.transfers import on_device, to_device
from pipeline.errors import HostOutOfMemory
from pipeline.protocol.drafts import OF_MODEL, DraftRequest, Proposed
from pipeline.protocol.messages import (
    CHUNK,
    MOST_DRAFTED,
    PROMPT_TOKENS_PER_STEP,
    MemoryBudget,
    rows_of_pass,
)
from pipeline.protocol.specs import SamplingOptions
from pipeline.sampling.games import FLOAT64_CANDIDATES, draw_rows
from pipeline.sampling.proposals import propose_from
from pipeline.worker.forward_batch import PADDING, ForwardBatch
from pipeline.worker.hosts import is_out_of_memory
from pipeline.worker.language_model_runner import LanguageModelRunner

WORTH_COPYING = 16  # tokens that another slot holds and the own one does not
READ_AS_ROWS = MOST_DRAFTED + 1  # tokens at most that are no prompt, where passes have room for rows


class DraftModel:
    """A `DraftingModel`: it keeps keys and values of the text that each slot read last.

    Args:
        runner: the loaded model, with one role.
        sampling: candidates, and the draw of rows that have no other.
        context_length: tokens of its longest text; None: any number.
    """

    def __init__(self, runner: LanguageModelRunner, sampling: SamplingOptions, context_length: int | None) -> None:
        self._runner = runner
        self._passes = runner.passes
        self._sampling = sampling
        self._context_length = context_length
        self.resize(runner.num_slots)

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of `row_tokens` tokens, and what is free."""
        return self._runner.memory_budget(row_tokens)

    def resize(self, num_slots: int) -> None:
        """Forget every row and hold `num_slots` at once from now on."""
        self._passes.let_go()
        self._cache = SlotCache(num_slots + 1)
        if self._passes.device.type == "cuda":
            torch.cuda.empty_cache()
        self._passes.lay_out(self._cache, [None] * (num_slots + 1), may_follow=True)
        self._held: list[Sequence[int]] = [()] * num_slots
        self._room = rows_of_pass(num_slots) if self._passes.has_fixed_shapes else 0
        self._record()

    @property
    def num_slots(self) -> int:
        """Rows at once."""
        return len(self._held)

    def forget(self) -> None:
        """Know nothing of any slot, as when it was loaded."""
        self._held = [()] * len(self._held)

    def _record(self) -> None:
        """Have its passes recorded, where they are: callers learn from what a call takes, without that."""
        if not self._held or self._passes.device.type != "cuda":
            return
        with suppress(HostOutOfMemory):  # the first call will say so
            self.propose([DraftRequest(0, [0] * (READ_AS_ROWS + 2), 0.5, (1.0, 1.0))])
        self.forget()

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposed | None]:
        """What comes next in each text; None where the text is longer than the model's context."""
        longest = self._context_length
        readable = [each for each in requests if longest is None or len(each.text) <= longest]
        if not readable:
            return [None] * len(requests)
        try:
            with on_device(self._passes.device):
                found = self._draw(readable, self._read(readable))
        except BaseException as error:
            self.forget()  # any row may be half-written
            if is_out_of_memory(error):
                raise HostOutOfMemory(f"{OF_MODEL}: {error}") from error
            raise
        by_slot = {each.slot: proposed for each, proposed in zip(readable, found, strict=True)}
        return [by_slot.get(each.slot) for each in requests]

    def _read(self, requests: Sequence[DraftRequest]) -> Tensor:
        """The logits [B, V] behind each text: what a slot does not hold of it is computed."""
        batch, begun = ForwardBatch(), []
        starts: dict[int, int] = {}  # by slot, where rows begin to read
        room = self._room - len(requests)
        for request in requests:
            last = len(request.text) - 1
            starts[request.slot] = start = last - self._num_as_rows(request, room)
            room -= last - start
            self._fill(batch, request, start)
            begun.append(request)
            if len(batch.tokens) > PROMPT_TOKENS_PER_STEP - CHUNK:  # what the memory of a pass is reckoned with
                self._passes.run(batch, torch.empty(0, dtype=torch.long))
                for each in begun:
                    self._held[each.slot] = tuple(each.text[: starts[each.slot]])
                batch, begun = ForwardBatch(), []
        ends = []
        for request in requests:
            for at in range(starts[request.slot], len(request.text)):
                batch.append(request.slot, at, request.text[at], PADDING)
            ends.append(len(batch.rows) - 1)
        done = self._passes.run(batch, torch.empty(0, dtype=torch.long))
        assert done is not None
        for request in requests:
            self._held[request.slot] = tuple(request.text)
        return done[to_device(ends, done.device, torch.long)]

    def _num_as_rows(self, request: DraftRequest, room: int) -> int:
        """Tokens before the last one that rows of the pass read, beside the one of the last token; 0: none.

        Where passes have fixed shapes, a prompt takes a pass of its own, and rows that no slot needs cost nothing.
        """
        missing = len(request.text) - 1 - _shared(self._held[request.slot], request.text)
        return missing if 0 < missing <= min(READ_AS_ROWS, room) else 0

    def _fill(self, batch: ForwardBatch, request: DraftRequest, stop: int) -> None:
        """Bring the tokens before `stop` into the slot's row, now or with the batch."""
        row = request.slot
        start = min(_shared(self._held[row], request.text), stop)
        if stop - start >= WORTH_COPYING:
            lengths = [_shared(held, request.text) for held in self._held]
            source = max(range(len(lengths)), key=lengths.__getitem__)
            if (held := min(lengths[source], stop)) - start >= WORTH_COPYING:
                self._cache.copy(Copied(source, row, start, held))
                start = held
        prompt = Prompt.of(None, request.text, 0)
        self._held[row] = prompt.tokens[:start]  # what the pass writes can be copied after it
        while stop - start > CHUNK:
            part = ForwardBatch()
            part.compute(row, prompt, start, start + CHUNK)
            self._passes.run(part, torch.empty(0, dtype=torch.long))
            start += CHUNK
            self._held[row] = prompt.tokens[:start]
        if start == stop:
            return
        source, shared = batch.begin(row, prompt)  # another row may begin with the same text in this pass
        if source != row and shared == stop:
            batch.prefix_copies.append(Copied(source, row, start, stop))
        else:
            batch.compute(row, prompt, start, stop)

    def _draw(self, requests: Sequence[DraftRequest], logits_BV: Tensor) -> list[Proposed]:
        options = self._sampling
        found = propose_from(
            logits_BV[:, None], logits_BV.shape[1], num_candidates=options.num_candidates, min_p=options.min_p
        )
        if found.base_logprobs_BK.shape[1] <= FLOAT64_CANDIDATES:
            found = found.cpu()  # as small games are
        base_BK = found.base_logprobs_BK.double().log_softmax(-1)
        uniforms_B = torch.tensor([each.uniform for each in requests], dtype=torch.float64, device=base_BK.device)
        drawn_B1 = draw_rows(options, base_BK, uniforms_B, [each.draw for each in requests])[:, None]
        tokens_B = (drawn_B1 if found.ids_BK is None else found.ids_BK.gather(-1, drawn_B1))[:, 0]
        chances_B = base_BK.gather(-1, drawn_B1)[:, 0].exp()
        return [Proposed(*each) for each in zip(tokens_B.tolist(), chances_B.tolist(), strict=True)]


def _shared(held: Sequence[int], text: Sequence[int]) -> int:
    """Tokens that both begin with."""
    most = min(len(held), len(text))
    if tuple(held[:most]) == tuple(text[:most]):
        return most
    return next(at for at, (one, other) in enumerate(zip(held, text, strict=False)) if one != other)
