"""Decode passes of a few fixed shapes: on a GPU each is recorded once as a CUDA graph, then replayed at once.

A small model's pass is hundreds of kernels, and starting them one by one takes longer than they run. A replay starts
them together; nothing in it waits for the host. R rows of a shape, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.drafts import Draft
from pipeline.models.slots import CAPACITY_STEP, SlotCache, SlotPass

MIN_ROWS = 4
WARM_PASSES = 2  # before a recording: libraries set themselves up in their first calls

Forward = Callable[[SlotPass, Tensor, Tensor], Tensor]  # packed token ids and positions [1, R] to logits [R, V]


@dataclass(slots=True)
class _Step:
    """A pass of one shape. `inputs` [3, R] are tokens, positions and cache rows; `logits` are the newest."""

    inputs: Tensor
    slot_pass: SlotPass
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None


class StaticSteps:
    """Runs decode passes by shape: rows rounded up to a power of two, lengths to a multiple of `CAPACITY_STEP`.

    Args:
        forward: the model over packed tokens.
        cache: where keys and values are; passes are made anew when its buffers move.
        spare_row: a cache row that nobody reads, for what rounding adds.
        device: where all of it is.
    """

    def __init__(self, forward: Forward, cache: SlotCache, *, spare_row: int, device: torch.device) -> None:
        self._forward = forward
        self._cache = cache
        self._spare_row = spare_row
        self._device = device
        self._records = device.type == "cuda"
        self._steps: dict[tuple[int, int], _Step] = {}
        self._moves = cache.num_moves

    def run(self, draft: Draft) -> Tensor:
        """The logits [rows, V] of a draft without prompts."""
        num_rows, longest = _rounded(len(draft.rows)), -(-max(draft.lengths) // CAPACITY_STEP) * CAPACITY_STEP
        self._cache.reserve(longest)
        if self._moves != self._cache.num_moves:
            self._steps.clear()
            self._moves = self._cache.num_moves
        step = self._steps.get((num_rows, longest))
        if step is None:
            step = self._steps[num_rows, longest] = self._make(num_rows, longest)
        self._load(step, draft)
        logits = self._replay(step) if self._records else self._compute(step)
        return logits[: len(draft.rows)]

    def _make(self, num_rows: int, longest: int) -> _Step:
        inputs = torch.zeros(3, num_rows, dtype=torch.long, device=self._device)
        lengths = (longest,) * num_rows
        return _Step(inputs, SlotPass(self._cache, (), (), (), lengths, inputs[2], inputs[1], per_row=False))

    def _load(self, step: _Step, draft: Draft) -> None:
        padding = step.inputs.shape[1] - len(draft.rows)
        columns = [
            [*draft.last_tokens, *([0] * padding)],
            [*(length - 1 for length in draft.lengths), *([0] * padding)],
            [*draft.rows, *([self._spare_row] * padding)],
        ]
        step.inputs.copy_(torch.tensor(columns))

    def _compute(self, step: _Step) -> Tensor:
        return self._forward(step.slot_pass, step.inputs[0][None], step.inputs[1][None])

    def _replay(self, step: _Step) -> Tensor:
        """Replay a pass; the first time, record it. A pass that cannot be recorded is computed as it is."""
        if step.graph is None:
            try:
                self._record(step)
            except RuntimeError as error:
                self._records = False
                warnings.warn(f"decode passes are not recorded as CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
                return self._compute(step)
        assert step.graph is not None
        assert step.logits is not None
        step.graph.replay()
        return step.logits

    def _record(self, step: _Step) -> None:
        """Warm up and record. Each pass writes the same keys to the same places: it may run any number of times."""
        main, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_PASSES):
                self._compute(step)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.logits = self._compute(step)
        step.graph = graph


def _rounded(num_rows: int) -> int:
    """The next power of two, at least `MIN_ROWS`."""
    return max(MIN_ROWS, 1 << (num_rows - 1).bit_length())
