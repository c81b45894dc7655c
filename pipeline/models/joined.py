"""Projections of one input as one matrix product: reading one large matrix is faster than several small ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# as transformers names them, in the order in which a layer calls them
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_projections(model: nn.Module) -> int:
    """Let sibling projections of the model share a product; the number of families that do."""
    families = []
    for parent in model.modules():
        for names in SIBLINGS:
            linears: list[Any] = [getattr(parent, name, None) for name in names]
            if _are_alike(linears):
                families.append((parent, names, linears))
    for parent, names, linears in families:
        product = _Product(linears)
        for at, name in enumerate(names):
            setattr(parent, name, _Share(product, at, is_last=at + 1 == len(names)))
    return len(families)


def _are_alike(linears: list[Any]) -> bool:
    """Whether they are plain projections of the same input."""
    if not all(type(each) is nn.Linear for each in linears):
        return False
    kinds = {(each.in_features, each.bias is None, each.weight.dtype, each.weight.device) for each in linears}
    return len(kinds) == 1


class _Product:
    """The product for all siblings, from the first one's call to the last one's."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.sizes = [each.out_features for each in linears]
        self.weight = nn.Parameter(torch.cat([each.weight for each in linears]), requires_grad=False)
        has_bias = linears[0].bias is not None
        bias = torch.cat([each.bias for each in linears]) if has_bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out: Tensor | None = None


class _Share(nn.Module):
    """One sibling's part of the product."""

    def __init__(self, product: _Product, at: int, *, is_last: bool) -> None:
        super().__init__()
        self._product = product
        self._is_first, self._is_last = at == 0, is_last
        self._start = sum(product.sizes[:at])
        self.out_features = product.sizes[at]
        self.in_features = product.weight.shape[1]
        if at == 0:
            self.weight, self.bias = product.weight, product.bias

    def forward(self, states: Tensor) -> Tensor:
        product = self._product
        if self._is_first:
            product.out = linear(states, self.weight, self.bias)
        out = product.out
        assert out is not None, "siblings are called in their order"
        if self._is_last:
            product.out = None
        return out.narrow(-1, self._start, self.out_features)
