"""Parts of cache rows that a pass computes or copies, and the rows that run in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of a prompt, for cache row `row`; computed together, after what stands before them."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Copied:
    """Tokens [start, stop) that `row` takes over from the cache row `source`."""

    source: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RunningRows:
    """The rows of a pass that append one token each.

    Args:
        rows: their places in the cache.
        lengths: their tokens after the pass.
        rows_R: `rows` as a tensor.
        last_R: the position of each newest token.
    """

    rows: Sequence[int]
    lengths: Sequence[int]
    rows_R: Tensor
    last_R: Tensor

    @classmethod
    def none(cls, device: torch.device) -> RunningRows:
        """No row runs: a pass over prompts alone."""
        nothing_R = torch.empty(0, dtype=torch.long, device=device)
        return cls((), (), nothing_R, nothing_R)
