"""Parts of cache rows that a pass computes or copies, and the rows that run in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt that is computed together, after the tokens before it.

    Args:
        row: the cache row.
        start: position of its first token.
        stop: position behind its last token.
    """

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Copied:
    """A part of one cache row that is copied to another.

    Args:
        source: the cache row that holds it.
        row: the cache row that receives it.
        start: position of its first token, in both rows.
        stop: position behind its last token.
    """

    source: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RunningRows:
    """The rows of a pass that append one token each; a row with proposed tokens is there once for each as well.

    Args:
        rows: the cache row of each.
        lengths: the number of tokens of each after the pass.
        rows_R: `rows` as a tensor on the device.
        last_R: the position of each newest token, on the device.
        may_follow: whether a cache row may be there more than once, with tokens that follow one another.
    """

    rows: Sequence[int]
    lengths: Sequence[int]
    rows_R: Tensor
    last_R: Tensor
    may_follow: bool = False

    def on(self, device: torch.device) -> RunningRows:
        """The same, with its tensors on another device."""
        return replace(self, rows_R=self.rows_R.to(device), last_R=self.last_R.to(device))

    @classmethod
    def none(cls, device: torch.device) -> RunningRows:
        """No row runs: a pass over prompts alone."""
        nothing_R = torch.empty(0, dtype=torch.long, device=device)
        return cls((), (), nothing_R, nothing_R)
