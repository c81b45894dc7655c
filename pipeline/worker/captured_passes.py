"""Passes of two fixed shapes: on a GPU each is captured once as a CUDA graph, then replayed.

A pass is hundreds of kernels, and starting them one by one takes longer than they run. A replay starts them together;
nothing in it waits for the CPU. One shape is that of all cache rows, whichever run, rounded up to whole tiles of
matrix kernels: a step costs what reading the weights costs. The other is for tokens of new prompts. The same kernels
compute every row, whatever the batch composition. A kernel that is chosen by the shape of its input is then always
the same one, so padding to two fixed shapes is also what makes a row's bits its own. The places that no running row
takes are room for proposed tokens: the shape is the same with them and without.

R rows, T tokens of prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.attention.prompt_segments import Prompts, serves
from pipeline.attention.segments import RunningRows, Segment
from pipeline.attention.slots import SlotCache, SlotPass
from pipeline.attention.transfers import to_device
from pipeline.attention.visibility import LayerFacts
from pipeline.protocol.messages import rows_of_pass
from pipeline.worker.cuda_graphs import GraphPool
from pipeline.worker.forward_batch import PromptPass

MIN_ROWS = 4  # matrix kernels treat fewer rows differently: pad, or a row's bits depend on the batch composition
MOST_SEGMENTS = 32  # of a pass over prompts

# token ids and positions [1, T], and n, to the last logits [n, V]
Forward = Callable[[SlotPass, Tensor, Tensor, int], Tensor]


class CapturedPasses:
    """Runs passes over running rows, and over prompts.

    Args:
        forward: computes the model over packed tokens.
        plain: the same, for a pass of another shape.
        cache: where keys and values are; passes are captured again when its buffers move.
        num_prompt_tokens: T.
        spare_row: a cache row that is never read, for padding.
        device: of the model and the cache.
        layers: what each attention call of a pass asks for.
        captures: whether a GPU captures them; otherwise they are computed anew every time.
        may_follow: whether a cache row may be in a pass more than once, with tokens that follow one another.
    """

    def __init__(
        self,
        forward: Forward,
        plain: Forward,
        cache: SlotCache,
        *,
        num_prompt_tokens: int,
        spare_row: int,
        device: torch.device,
        layers: Sequence[LayerFacts] = (),
        captures: bool = True,
        may_follow: bool = False,
    ) -> None:
        self._layers = layers
        self._may_follow = may_follow
        self._forward = forward
        self._plain = plain
        self._cache = cache
        self._spare_row = spare_row
        self._device = device
        self._num_rows = rows_of_pass(cache.num_rows - 1)
        # tokens, positions and cache rows
        self._inputs = torch.zeros(3, self._num_rows, dtype=torch.long, device=device)
        self._prompt_ids = torch.zeros(num_prompt_tokens, dtype=torch.long, device=device)
        self._prompts = Prompts(num_prompt_tokens, MOST_SEGMENTS, spare_row=spare_row, device=device)
        self._moves = -1
        self.graphs = GraphPool(device, "passes", captures=captures)

    def run_rows(self, tokens_R: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """The logits [rows, V] of these rows' newest tokens; lengths count those."""
        self._reserve(max(lengths))
        padding = self._num_rows - len(rows)
        columns = [[*(length - 1 for length in lengths), *([0] * padding)], [*rows, *([self._spare_row] * padding)]]
        self._inputs[1:].copy_(to_device(columns, self._device, torch.long), non_blocking=True)
        self._inputs[0, : len(rows)] = tokens_R
        return self.graphs.run("rows", self._pass_rows)[: len(rows)]

    def run_prompts(self, part: PromptPass) -> None:
        """Compute parts of prompts; their logits are not needed."""
        self._reserve(max(segment.stop for segment in part.segments))
        missing = len(self._prompt_ids) - len(part.tokens)
        self._prompt_ids.copy_(
            to_device([*part.tokens, *([0] * missing)], self._device, torch.long), non_blocking=True
        )
        self._prompts.load(part.segments)
        suits = all(facts.suits_flash_attention for facts in self._layers)
        if suits and all(map(serves, self._cache.keys, self._cache.values)):
            self.graphs.run("prompts", self._pass_prompts)
        else:  # the parts are computed one by one, which differs every time
            self._pass_prompts()

    def _reserve(self, num_tokens: int) -> None:
        if not self._cache.keys:  # the first pass allocates the buffers
            first = SlotPass(
                self._cache,
                [Segment(self._spare_row, 0, 1)],
                (),
                RunningRows.none(self._device),
                per_row=True,
                layers=self._layers,
            )
            self._plain(first, self._prompt_ids[None, :1], self._prompt_ids[None, :1], 1)
        self._cache.reserve(num_tokens)
        if self._moves != self._cache.num_moves:
            self._moves = self._cache.num_moves
            self.graphs.clear()

    def _pass_rows(self) -> Tensor:
        """Compute from the inputs. Running it again writes the same keys to the same places, as a capture
        requires."""
        tokens_R, last_R, rows_R = self._inputs
        lengths = (self._cache.capacity,) * self._num_rows
        running = RunningRows((), lengths, rows_R, last_R, self._may_follow)
        slot_pass = SlotPass(self._cache, (), (), running, per_row=False, layers=self._layers)
        return self._forward(slot_pass, tokens_R[None], last_R[None], self._num_rows)

    def _pass_prompts(self) -> Tensor:
        running = RunningRows.none(self._device)
        slot_pass = SlotPass(self._cache, (), (), running, per_row=True, prompts=self._prompts, layers=self._layers)
        return self._forward(slot_pass, self._prompt_ids[None], self._prompts.positions[None], 1)
