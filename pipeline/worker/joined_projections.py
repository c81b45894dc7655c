"""Projections of one input joined into one matrix product: reading one large matrix is faster than several small."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.worker.adapters import AdaptedLinear, LowRank
from pipeline.worker.quantised import is_plain

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as transformers names them


def join_projections(model: nn.Module) -> int:
    """Have sibling projections of the model share a product; returns the number of products."""
    num_families = 0
    parents = [module for module in model.modules() if any(hasattr(module, names[0]) for names in SIBLINGS)]
    for parent in parents:
        for names in SIBLINGS:
            siblings: list[Any] = [getattr(parent, name, None) for name in names]
            if not _are_alike(list(map(_plain, siblings))):
                continue
            product = _Product(siblings)
            del siblings  # so that the weights of one product at a time are in memory twice
            for at, name in enumerate(names):
                setattr(parent, name, _Share(product, at))
            num_families += 1
    return num_families


def _plain(projection: Any) -> Any:
    return projection.base if isinstance(projection, AdaptedLinear) else projection


def _are_alike(linears: list[Any]) -> bool:
    """Whether they are plain projections of the same kind of input; quantised ones are left alone."""
    if not all(type(each) is nn.Linear and is_plain(each.weight) for each in linears):
        return False
    kinds = {(each.in_features, each.bias is None, each.weight.dtype, each.weight.device) for each in linears}
    return len(kinds) == 1


class _Product:
    """The product for all siblings, from the first call to the last; `num_waiting` of them are still to be called."""

    def __init__(self, siblings: Sequence[Any]) -> None:
        linears = list(map(_plain, siblings))
        self.sizes = [each.out_features for each in linears]
        self.weight = nn.Parameter(torch.cat([each.weight for each in linears]), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if linears[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([each.bias for each in linears]), requires_grad=False)
        parts = [each.low_rank if isinstance(each, AdaptedLinear) else None for each in siblings]
        self.low_rank = _join(parts, self.sizes)
        self.num_waiting = 0
        self.states: Tensor | None = None
        self.out: Tensor | None = None


class _Share(nn.Module):
    """One sibling's part of the product."""

    def __init__(self, product: _Product, at: int) -> None:
        super().__init__()
        self._product = product
        self._start = sum(product.sizes[:at])
        self.in_features, self.out_features = product.weight.shape[1], product.sizes[at]
        self.weight, self.bias, self.low_rank = product.weight, product.bias, product.low_rank

    def forward(self, states: Tensor) -> Tensor:
        product = self._product
        if not product.num_waiting:
            product.states, product.out = states, self._compute(states)
            product.num_waiting = len(product.sizes)
        elif product.states is not states:  # a model that gives its siblings other inputs
            return self._compute(states, slice(self._start, self._start + self.out_features))
        out = product.out
        assert out is not None
        product.num_waiting -= 1
        if not product.num_waiting:
            product.states = product.out = None
        return out.narrow(-1, self._start, self.out_features)

    def _compute(self, states: Tensor, rows: slice = slice(None)) -> Tensor:
        """Some of all siblings' outputs."""
        out = linear(states, self.weight[rows], None if self.bias is None else self.bias[rows])
        return out if self.low_rank is None else out + self.low_rank(states, rows)


def _join(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank | None:
    """What the adapters add to all siblings; each part's ranks lead to its own outputs alone."""
    present = [(part, start) for part, start in zip(parts, accumulate(sizes, initial=0), strict=False) if part]
    if not present:
        return None
    first = present[0][0]
    down = torch.cat([part.down for part, _ in present])
    up = first.up.new_zeros(sum(sizes), len(down))
    at = 0
    for part, start in present:
        up[start : start + len(part.up), at : at + len(part.down)] = part.up
        at += len(part.down)
    columns = None
    if any(part.columns is not None for part, _ in present):
        none = [torch.zeros(len(part.down), dtype=torch.long, device=down.device) for part, _ in present]
        columns = torch.cat(
            [zeros if part.columns is None else part.columns for (part, _), zeros in zip(present, none, strict=True)]
        )
    return LowRank(down, up, torch.cat([part.gates for part, _ in present], 1), first.adapters, columns)
