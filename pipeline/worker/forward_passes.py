"""Forward passes of one model over packed tokens: those of a `ForwardBatch`, and whole texts.

T packed tokens, R running rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.rows import can_build_for
from pipeline.attention.segments import RunningRows, Segment
from pipeline.attention.slots import SlotCache, SlotPass, serving
from pipeline.attention.transfers import to_device
from pipeline.attention.visibility import LayerFacts
from pipeline.hub.model_facts import context_length, stated, text_config
from pipeline.protocol.memory import PROMPT_SHAPE
from pipeline.protocol.messages import DRAWN
from pipeline.worker.adapters import TokenAdapters
from pipeline.worker.captured_passes import MIN_ROWS, MOST_SEGMENTS, CapturedPasses
from pipeline.worker.compiled_layers import CompiledLayers, can_be_compiled
from pipeline.worker.forward_batch import ForwardBatch
from pipeline.worker.layer_devices import devices_of
from pipeline.worker.memory import pass_sizes
from pipeline.worker.ranks import num_ranks
from pipeline.worker.stopwatch import Stopwatch
from pipeline.worker.whole_vectors import WholeVectors


class Passes:
    """Runs a model.

    On a CPU prompts are computed in the same pass as the running rows. On a GPU passes have two shapes, captured as
    CUDA graphs, with compiled layers: one for all running rows, and one for prompts, which take passes of their own.
    There kernels depend on the shape of a pass, and a row's bits on the kernels.

    Args:
        model: a causal LM in eval mode with the slot attention.
        vocab_size: logits beyond it are cut.
        adapters: of the model, where it has some.
        strict: no row's bits depend on the batch composition.
        has_fixed_shapes: whether passes have fixed shapes; None: on a GPU.
        layers: what each attention call of a pass asks for, as `learn_layers` found.
        needs_whole_vectors: whether activations have to be padded for a row's bits to be its own; see `WholeVectors`.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        adapters: TokenAdapters | None = None,
        strict: bool,
        has_fixed_shapes: bool | None = None,
        layers: Sequence[LayerFacts] = (),
        needs_whole_vectors: bool = False,
    ) -> None:
        self._layers = layers
        self._needs_whole_vectors = needs_whole_vectors
        self._shares_keys = bool(stated(text_config(model.config), "num_kv_shared_layers"))
        self._model = model
        self._vocab_size = vocab_size
        self._adapters = adapters
        self._strict = strict
        self.sizes = pass_sizes(model, vocab_size)
        self.devices = devices_of(model)
        self.device = self.devices[0]
        self._dtype = next(model.parameters()).dtype
        self.has_fixed_shapes = can_build_for(self.device) if has_fixed_shapes is None else has_fixed_shapes
        # a compiled layer would not see the collectives of ranks, nor moves between devices; a graph is of one GPU
        self._is_whole = num_ranks() == 1 and len(self.devices) == 1
        may_compile = self._is_whole and can_be_compiled(model)
        is_compiled = self.has_fixed_shapes and self.device.type == "cuda" and may_compile
        self._compiled = CompiledLayers(model) if is_compiled else None
        self._captured_passes: CapturedPasses | None = None
        self._cache: SlotCache | None = None
        self._spare_row = 0
        # the number of each cache row's adapter
        self._adapters_of_rows = torch.zeros(1, dtype=torch.long)
        # the preferences of each cache row, where an adapter depends on them
        self._preferences_of_rows: Tensor | None = None
        self._watch = Stopwatch(self.device)
        self.num_forwards = self.num_tokens = 0

    @property
    def context_length(self) -> int | None:
        """Most tokens of a text, as the model's configuration states it; None where it states none."""
        return context_length(self._model.config)

    @property
    def forward_s(self) -> float:
        """Seconds that passes took, on the device."""
        return self._watch.seconds

    def lay_out(self, cache: SlotCache, adapters: Sequence[str | None], *, may_follow: bool = False) -> None:
        """Compute into this cache from now on.

        Args:
            cache: of all rows, of which the last is for padding.
            adapters: of its rows.
            may_follow: whether a row may be in a pass more than once, with tokens that follow one another.
        """
        self._cache, self._spare_row = cache, cache.num_rows - 1
        if self._adapters is not None:
            numbers = [self._adapters.number(name) for name in adapters]
            self._adapters_of_rows = torch.tensor(numbers, device=self.device)
            if width := self._adapters.num_preferences:
                self._preferences_of_rows = torch.ones(len(numbers), width, device=self.device, dtype=self._dtype)
        if self.has_fixed_shapes:
            self._captured_passes = CapturedPasses(
                self._compute_compiled,
                self._compute,
                cache,
                num_prompt_tokens=PROMPT_SHAPE,
                spare_row=self._spare_row,
                device=self.device,
                layers=self._layers,
                captures=self._is_whole,
                may_follow=may_follow,
            )

    def prefer(self, row: int, preference: Sequence[float] | None) -> None:
        """Have a cache row use its adapter at a preference vector, as `TokenAdapters.preference` gives it."""
        if preference is not None:
            assert self._preferences_of_rows is not None
            self._preferences_of_rows[row] = torch.tensor(preference, device=self.device, dtype=self._dtype)

    def let_go(self) -> None:
        """Hold no cache any more, so that its memory can be used."""
        self._cache = self._captured_passes = None

    def run(self, batch: ForwardBatch, newest_S: Tensor) -> Tensor | None:
        """The newest logits [R, V] of the batch's rows; None where nothing was to be computed.

        Strict passes that are not of fixed shapes add padding to the batch.

        `newest_S` has the tokens that were drawn on the device, by slot, for rows whose token is DRAWN.
        """
        if not batch.tokens and not batch.rows:
            return None
        if self._captured_passes is not None:
            return self._run_captured(self._captured_passes, batch, newest_S)
        if self._strict:
            batch.pad(MIN_ROWS, row=self._spare_row)
        rows_R = to_device(batch.rows, self.device, torch.long)
        last_R = to_device(batch.lengths, self.device, torch.long) - 1
        # on a CPU a call a row costs less than the copies that a batch of rows needs
        per_row = self._strict or self.device.type == "cpu"
        running = RunningRows(batch.rows, batch.lengths, rows_R, last_R)
        slot_pass = SlotPass(self._cache, batch.segments, batch.prefix_copies, running, per_row, layers=self._layers)
        ids_T = torch.cat([to_device(batch.tokens, self.device, torch.long), self._last_tokens(batch, newest_S)])
        positions = [*batch.positions, *(length - 1 for length in batch.lengths)]
        positions_T = to_device(positions, self.device, torch.long)
        with self._counting(len(ids_T)):
            # logits of one row at least; where no row runs yet they are not read
            logits_RV = self._compute(slot_pass, ids_T[None], positions_T[None], max(len(batch.rows), 1))
        return logits_RV[: len(batch.rows)]

    def _run_captured(self, steps: CapturedPasses, batch: ForwardBatch, newest_S: Tensor) -> Tensor | None:
        assert self._cache is not None
        for part in batch.prompt_passes(PROMPT_SHAPE, MOST_SEGMENTS):
            for copied in part.copies:
                self._cache.copy(copied)
            if part.segments:
                with self._counting(len(part.tokens)):
                    steps.run_prompts(part)
        if not batch.rows:
            return None
        with self._counting(len(batch.rows)):
            return steps.run_rows(self._last_tokens(batch, newest_S), batch.rows, batch.lengths)

    def score(
        self, tokens: Sequence[int], adapter: str | None, keep: int, preference: Sequence[float] | None = None
    ) -> Tensor:
        """The logits [keep, V] of the last tokens of a text, which leaves nothing behind.

        `preference` is the row of the adapter's preferences, where it depends on them.
        """
        segments = [Segment(-1, 0, len(tokens))]
        slot_pass = SlotPass(
            None, segments, (), RunningRows.none(self.device), per_row=self._strict, layers=self._layers
        )
        ids_T = torch.tensor(tokens, device=self.device)
        positions_T = torch.arange(len(tokens), device=self.device)
        number = 0 if self._adapters is None else self._adapters.number(adapter)
        with self._counting(len(tokens)):
            preferences = None
            if preference is not None:
                row = torch.tensor(preference, device=self.device, dtype=self._dtype)
                preferences = row.expand(len(tokens), -1)
            numbers_T = torch.full_like(ids_T, number)
            return self._compute(slot_pass, ids_T[None], positions_T[None], keep, numbers_T, preferences)

    def _compute_compiled(self, slot_pass: SlotPass, ids: Tensor, positions: Tensor, keep: int) -> Tensor:
        with nullcontext() if self._compiled is None else self._compiled.in_use():
            return self._compute(slot_pass, ids, positions, keep)

    def _last_tokens(self, batch: ForwardBatch, newest_S: Tensor) -> Tensor:
        """The newest tokens [R] of running rows, those among them that were drawn on the device."""
        given_R = to_device(batch.last_tokens, self.device, torch.long)
        if DRAWN not in batch.last_tokens:
            return given_R
        return torch.where(given_R == DRAWN, newest_S[to_device(batch.last_slots, self.device, torch.long)], given_R)

    def _compute(
        self,
        slot_pass: SlotPass,
        ids: Tensor,
        positions: Tensor,
        keep: int,
        adapters_T: Tensor | None = None,
        preferences: Tensor | None = None,
    ) -> Tensor:
        """The logits [keep, V] of the last of the tokens [1, T], whose adapters are their rows' unless given."""
        if self._adapters is not None:
            if adapters_T is None:
                rows_T = slot_pass.token_rows(self.device)
                adapters_T = self._adapters_of_rows[rows_T]
                preferences = None if self._preferences_of_rows is None else self._preferences_of_rows[rows_T]
            self._adapters.of_tokens, self._adapters.preferences = adapters_T, preferences
        num_tokens = ids.shape[1]
        # asked by a number, a model with shared keys leaves the other tokens out of the layers that share
        kept = torch.arange(num_tokens - keep, num_tokens, device=ids.device) if self._shares_keys else keep
        with serving(slot_pass), WholeVectors() if self._needs_whole_vectors else nullcontext():
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,  # the attention keeps keys and values itself
                logits_to_keep=kept,
            )
        # the last ones: some models give logits of all tokens, whatever they are asked for
        logits: Tensor = output.logits[0, -keep:, : self._vocab_size]
        return logits.float()

    @contextmanager
    def _counting(self, num_tokens: int) -> Iterator[None]:
        with self._watch.running():
            yield
        self.num_forwards += 1
        self.num_tokens += num_tokens
