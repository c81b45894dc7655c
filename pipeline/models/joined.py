"""Projections of one input as one matrix product: reading one large matrix is faster than several small ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as transformers names them


def join_projections(model: nn.Module) -> int:
    """Let sibling projections of the model share a product; the number of families that do."""
    num_families = 0
    for parent in list(model.modules()):
        for names in SIBLINGS:
            linears: list[Any] = [getattr(parent, name, None) for name in names]
            if not _are_alike(linears):
                continue
            product = _Product(linears)
            del linears  # one family is in memory twice, not all
            for at, name in enumerate(names):
                setattr(parent, name, _Share(product, at))
            num_families += 1
    return num_families


def _are_alike(linears: list[Any]) -> bool:
    """Whether they are plain projections of the same kind of input."""
    if not all(type(each) is nn.Linear for each in linears):
        return False
    kinds = {(each.in_features, each.bias is None, each.weight.dtype, each.weight.device) for each in linears}
    return len(kinds) == 1


class _Product:
    """The product for all siblings, from the first call to the last; `num_waiting` of them are still to be called."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.sizes = [each.out_features for each in linears]
        self.weight = nn.Parameter(torch.cat([each.weight for each in linears]), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if linears[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([each.bias for each in linears]), requires_grad=False)
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
        self.weight, self.bias = product.weight, product.bias

    def forward(self, states: Tensor) -> Tensor:
        product = self._product
        if not product.num_waiting:
            product.states, product.out = states, linear(states, self.weight, self.bias)
            product.num_waiting = len(product.sizes)
        elif product.states is not states:  # a model that gives its siblings other inputs
            own = slice(self._start, self._start + self.out_features)
            return linear(states, self.weight[own], None if self.bias is None else self.bias[own])
        out = product.out
        assert out is not None
        product.num_waiting -= 1
        if not product.num_waiting:
            product.states = product.out = None
        return out.narrow(-1, self._start, self.out_features)
