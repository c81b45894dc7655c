"""Forward passes of a model whose layers keep states: over a part of one prompt, over running rows, or a whole text.

A layer with a state cannot read tokens of several rows packed one after another. So a pass has a dimension for rows:
one row with a part of its prompt, or all running rows with one token each.

T tokens, R running rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.cached_layers import CachedLayer, cache_argument
from pipeline.attention.segments import Copied, RunningRows, Segment
from pipeline.attention.slots import SlotCache, SlotPass, serving
from pipeline.attention.states import PassCache, SlotStates
from pipeline.attention.transfers import to_device
from pipeline.attention.visibility import LayerFacts
from pipeline.protocol.messages import DRAWN
from pipeline.worker.adapters import TokenAdapters
from pipeline.worker.captured_passes import MIN_ROWS
from pipeline.worker.layer_devices import devices_of
from pipeline.worker.memory import pass_sizes
from pipeline.worker.stopwatch import Stopwatch
from pipeline.worker.whole_vectors import WholeVectors


@dataclass(slots=True)
class RunningBatch:
    """Rows that append one token each.

    Args:
        rows: the cache row of each.
        lengths: of these rows, after the pass.
        tokens: the token that each appends; DRAWN where only the device knows it.
        slots: the slot of each, by which the device finds a drawn token.
    """

    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def append(self, row: int, length: int, token: int, slot: int) -> None:
        """Add a row."""
        self.rows.append(row)
        self.lengths.append(length)
        self.tokens.append(token)
        self.slots.append(slot)

    def sort(self) -> None:
        """Order by row: the states of all rows of a host are then one range, which needs no copy."""
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        for name in ("rows", "lengths", "tokens", "slots"):
            values = getattr(self, name)
            setattr(self, name, [values[at] for at in order])

    def place(self, num_rows: int, *, spare_row: int) -> None:
        """Have `num_rows` rows, each in the place of its number, and padding where a row does not run."""
        places = {row: at for at, row in enumerate(self.rows)}
        old = RunningBatch(self.rows, self.lengths, self.tokens, self.slots)
        self.rows, self.lengths, self.tokens, self.slots = [], [], [], []
        for row in range(num_rows):
            if (at := places.get(row)) is None:
                self.append(spare_row, 1, 0, 0)
            else:
                self.append(row, old.lengths[at], old.tokens[at], old.slots[at])

    def pad(self, min_rows: int, *, spare_row: int) -> None:
        """Add padding behind the rows until there are `min_rows`."""
        for _ in range(min_rows - len(self.rows)):
            self.append(spare_row, 1, 0, 0)


class RecurrentPasses:
    """Runs a model with recurrent layers.

    Args:
        model: a causal LM in eval mode with the slot attention.
        vocab_size: logits beyond it are cut.
        adapters: of the model, where it has some.
        strict: no row's bits depend on the batch composition.
        layers: what each attention call of a pass asks for, as `learn_layers` found.
        cached: what transformers' cache holds by layer, as `learn_states` found.
        needs_whole_vectors: whether activations have to be padded for a row's bits to be its own; see `WholeVectors`.
    """

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        adapters: TokenAdapters | None,
        strict: bool,
        layers: Sequence[LayerFacts],
        cached: Sequence[CachedLayer],
        needs_whole_vectors: bool = False,
    ) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._adapters = adapters
        self._strict = strict
        self._layers = layers
        self._cached = cached
        self._needs_whole_vectors = needs_whole_vectors
        self._cache_argument = cache_argument(model)
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        self.devices = devices_of(model)
        self.device = self.devices[0]
        self.dtype: torch.dtype = model.dtype
        self.sizes = pass_sizes(model, vocab_size)
        self._watch = Stopwatch(self.device)
        self.num_forwards = self.num_tokens = 0
        self._num_running = 0
        self._numbers: list[int] = []

    @property
    def forward_s(self) -> float:
        """Seconds that passes took, on the device."""
        return self._watch.seconds

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys, values and states."""
        return self._cache.num_bytes + self._states.num_bytes

    @property
    def cache_bytes_per_token(self) -> Counter[torch.device]:
        """Bytes per token of one row, by device; none before the first pass."""
        return self._cache.bytes_per_token()

    def lay_out(self, num_running: int, adapters: Sequence[str | None]) -> None:
        """Hold so many cache rows, all of them empty.

        Args:
            num_running: how many rows may run, the first ones.
            adapters: of all rows, of which the last is for padding.
        """
        self._num_running = num_running
        self._spare_row = len(adapters) - 1
        self._cache = SlotCache(len(adapters))
        self._states = SlotStates(self._model, self._cached, len(adapters))
        if self._adapters is not None:
            self._numbers = [self._adapters.number(name) for name in adapters]

    def let_go(self) -> None:
        """Hold no rows any more, so that their memory can be used."""
        del self._cache, self._states

    def copy(self, source: int, row: int, start: int, stop: int) -> None:
        """Copy keys and values of tokens [start, stop) of a row to another, and its states as they are now."""
        if self._cache.keys:
            self._cache.copy(Copied(source, row, start, stop))
        self._states.copy(source, row)

    def read(self, row: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read a part of a row's prompt; the logits [V] after it.

        Args:
            row: the cache row.
            tokens: of the part.
            start: how many tokens the row has read before.
        """
        segment = Segment(row, start, start + len(tokens))
        slot_pass = self._pass([segment], RunningRows.none(self.device))
        rows = slice(row, row + 1)
        states = self._states.begin(rows, has_previous=start > 0)
        ids_T = to_device(tokens, self.device, torch.long)
        positions_T = torch.arange(segment.start, segment.stop, device=self.device)
        logits_V = self._compute(slot_pass, states, ids_T[None], positions_T[None], [row] * len(tokens))[0]
        self._states.end(states, rows, 1)
        return logits_V

    def append(self, batch: RunningBatch, newest_S: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token of each row: the cache rows [R] that ran, and their logits [R, V].

        Padding has the number behind the last row that may run.
        `newest_S` has the tokens that were drawn on the device, by slot, for rows whose token is DRAWN.
        """
        batch.sort()
        if self._strict and self.device.type == "cuda":
            # kernels are chosen by the shape of a pass, and a row's bits by its kernels: one shape, one place
            batch.place(max(self._num_running, MIN_ROWS), spare_row=self._spare_row)
        elif self._strict:
            batch.pad(MIN_ROWS, spare_row=self._spare_row)
        rows_R, last_R = (
            to_device(each, self.device, torch.long)
            for each in (batch.rows, [length - 1 for length in batch.lengths])
        )
        running = RunningRows(batch.rows, batch.lengths, rows_R, last_R)
        first, last = batch.rows[0], batch.rows[-1]
        is_range = batch.rows == list(range(first, last + 1))
        rows = slice(first, last + 1) if is_range else rows_R
        states = self._states.begin(rows, has_previous=True)
        ids_R = self._last_tokens(batch, newest_S)
        logits_RV = self._compute(self._pass((), running), states, ids_R[:, None], last_R[:, None], batch.rows)
        self._states.end(states, rows, len(batch.rows))
        return rows_R.clamp(max=self._num_running), logits_RV

    def score(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """The logits [T, V] of a text, which leaves nothing behind."""
        slot_pass = SlotPass(
            None, [Segment(-1, 0, len(tokens))], (), RunningRows.none(self.device), per_row=True, layers=self._layers
        )
        ids_T = to_device(tokens, self.device, torch.long)
        if self._adapters is not None:
            self._adapters.of_tokens = torch.full_like(ids_T, self._adapters.number(adapter))
        positions_T = torch.arange(len(tokens), device=self.device)
        options = {"position_ids": positions_T[None]} if "position_ids" in self._arguments else {}
        with self._running(slot_pass, len(tokens)):
            logits: Tensor = self._model(input_ids=ids_T[None], use_cache=False, **options).logits
        return logits[0, :, : self._vocab_size].float()

    def _pass(self, segments: Sequence[Segment], running: RunningRows) -> SlotPass:
        # on a CPU a call a row costs less than the copies that a batch of rows needs
        per_row = self._strict or self.device.type == "cpu"
        return SlotPass(self._cache, segments, (), running, per_row, layers=self._layers)

    def _last_tokens(self, batch: RunningBatch, newest_S: Tensor) -> Tensor:
        """The newest tokens [R] of running rows, those among them that were drawn on the device."""
        given_R = to_device(batch.tokens, self.device, torch.long)
        if DRAWN not in batch.tokens:
            return given_R
        return torch.where(given_R == DRAWN, newest_S[to_device(batch.slots, self.device, torch.long)], given_R)

    def _compute(
        self, slot_pass: SlotPass, states: PassCache, ids: Tensor, positions: Tensor, rows: Sequence[int]
    ) -> Tensor:
        """The logits [R, V] of the last token of each row, of tokens [R, T] whose cache rows are given."""
        if self._adapters is not None:
            numbers = [self._numbers[row] for row in rows]
            self._adapters.of_tokens = to_device(numbers, self.device, torch.long)
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1, self._cache_argument: states}
        given = {name: value for name, value in options.items() if name in self._arguments}
        with self._running(slot_pass, ids.numel()):
            output = self._model(input_ids=ids, use_cache=True, **given)
        logits: Tensor = output.logits[:, -1, : self._vocab_size]
        return logits.float()

    @contextmanager
    def _running(self, slot_pass: SlotPass, num_tokens: int) -> Iterator[None]:
        whole = WholeVectors() if self._needs_whole_vectors else nullcontext()
        with self._watch.running(), serving(slot_pass), whole:
            yield
        self.num_forwards += 1
        self.num_tokens += num_tokens
