"""Forward passes of one model over packed tokens: what is drafted, and texts as they stand.

T packed tokens, R running rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.models.drafts import Draft
from pipeline.models.slots import Segment, SlotCache, SlotPass, running
from pipeline.models.static_steps import StaticSteps

MIN_ROWS = 4  # matrix kernels treat fewer rows differently: pad, or a row's bits depend on its company
BACKBONE = "__base__"  # peft's name for "no adapter" in a mixed batch


class Passes:
    """Runs a model.

    Args:
        model: a causal LM in eval mode with the slot attention; a PeftModel where adapters are mixed.
        vocab_size: logits beyond it are cut.
        mixes_adapters: whether tokens of one pass may have different adapters.
        strict: attend row by row and pad small passes, so that no row's bits depend on its company.
        has_static_steps: whether passes without prompts have fixed shapes; None: on a GPU, unless strict.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        mixes_adapters: bool,
        strict: bool,
        has_static_steps: bool | None = None,
    ) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._mixes_adapters = mixes_adapters
        self._strict = strict
        self.device: torch.device = next(model.parameters()).device
        wanted = self.device.type == "cuda" and not strict if has_static_steps is None else has_static_steps
        self._has_static_steps = wanted and not mixes_adapters
        self._static_steps: StaticSteps | None = None
        self._cache: SlotCache | None = None
        self._spare_row = 0
        self.num_forwards = self.num_tokens = 0
        self.forward_s = 0.0

    def lay_out(self, cache: SlotCache, spare_row: int) -> None:
        """Compute into this cache from now on; `spare_row` is a row of it that nobody reads."""
        self._cache, self._spare_row = cache, spare_row
        if self._has_static_steps:
            self._static_steps = StaticSteps(self._compute, cache, spare_row=spare_row, device=self.device)

    def let_go(self) -> None:
        """Hold no cache any more, so that its memory can be used."""
        self._cache = self._static_steps = None

    def run(self, draft: Draft) -> tuple[Tensor, Tensor] | None:
        """The cache rows [R] that ran and their newest logits [R, V]; None where nothing was to be computed."""
        if self._strict:
            draft.pad(MIN_ROWS, row=self._spare_row, mixes_adapters=self._mixes_adapters)
        if not draft.tokens and not draft.rows:
            return None
        started_s = time.perf_counter()
        rows_R = torch.tensor(draft.rows, dtype=torch.long, device=self.device)
        if self._static_steps is not None and not draft.tokens and not draft.follows:
            logits_RV = self._static_steps.run(draft)
        else:
            logits_RV = self._run_packed(draft, rows_R)
        self._count(started_s, len(draft.tokens) + len(draft.rows))
        return rows_R, logits_RV

    def score(self, tokens: Sequence[int], adapter: str | None, keep: int) -> Tensor:
        """The logits [keep, V] of the last tokens of a text, which leaves nothing behind."""
        started_s = time.perf_counter()
        nothing_R = torch.empty(0, dtype=torch.long, device=self.device)
        segments = [Segment(-1, 0, len(tokens))]
        slot_pass = SlotPass(None, segments, (), (), (), nothing_R, nothing_R, per_row=self._strict)
        logits_TV = self._forward(slot_pass, tokens, range(len(tokens)), [adapter] * len(tokens), keep)
        self._count(started_s, len(tokens))
        return logits_TV

    def _run_packed(self, draft: Draft, rows_R: Tensor) -> Tensor:
        last_R = torch.tensor(draft.lengths, dtype=torch.long, device=self.device) - 1
        # on a CPU a call a row costs less than the copies that a batch of rows needs
        per_row = self._strict or self.device.type == "cpu"
        slot_pass = SlotPass(
            self._cache, draft.segments, draft.follows, draft.rows, draft.lengths, rows_R, last_R, per_row
        )
        tokens = [*draft.tokens, *draft.last_tokens]
        positions = [*draft.positions, *(length - 1 for length in draft.lengths)]
        return self._forward(slot_pass, tokens, positions, [*draft.adapters, *draft.last_adapters], len(draft.rows))

    def _forward(
        self,
        slot_pass: SlotPass,
        tokens: Sequence[int],
        positions: Sequence[int],
        adapters: Sequence[str | None],
        keep: int,
    ) -> Tensor:
        """One pass over packed tokens; the logits [keep, V] of the last ones."""
        # adapters are mixed along the batch dimension: the tokens lie there, each on its own
        shape = (len(tokens), 1) if self._mixes_adapters else (1, len(tokens))
        mixed = {"adapter_names": [name or BACKBONE for name in adapters]} if self._mixes_adapters else {}
        ids = torch.tensor(tokens, device=self.device).view(shape)
        at = torch.tensor(list(positions), device=self.device).view(shape)
        logits_TV = self._compute(slot_pass, ids, at, keep=1 if self._mixes_adapters else max(keep, 1), **mixed)
        return logits_TV[len(logits_TV) - keep :]

    def _compute(
        self, slot_pass: SlotPass, ids: Tensor, positions: Tensor, *, keep: int | None = None, **mixed: Any
    ) -> Tensor:
        """The logits [T, V] of the last `keep` tokens of each row of `ids`; of all of them without it."""
        with running(slot_pass):
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=slot_pass.cache,
                use_cache=slot_pass.cache is not None,
                logits_to_keep=ids.shape[1] if keep is None else keep,
                **mixed,
            )
        logits: Tensor = output.logits.reshape(-1, output.logits.shape[-1])[:, : self._vocab_size]
        return logits.float()

    def _count(self, started_s: float, num_tokens: int) -> None:
        self.num_forwards += 1
        self.num_tokens += num_tokens
        self.forward_s += time.perf_counter() - started_s
