"""Ids that no token has, in the midst of a vocabulary: no model may draw them, and none gives them probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def without_holes(logits_XV: Tensor, holes: Sequence[int]) -> Tensor:
    """Logits with the lowest useful number at the holes: their probability is 0, and differences stay numbers."""
    if not holes:
        return logits_XV
    return logits_XV.index_fill(-1, torch.tensor(list(holes), device=logits_XV.device), _lowest(logits_XV.dtype))


def close_holes(model: Any, holes: Sequence[int]) -> None:
    """Have a causal LM give its logits without holes from now on, however it is called."""
    if not holes:
        return
    at = torch.tensor(list(holes), device=next(model.parameters()).device)

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits.index_fill(-1, at, _lowest(output.logits.dtype))
        return output

    model.register_forward_hook(hook)


def _lowest(dtype: torch.dtype) -> float:
    """Far below every logit, and far enough from the end of the type that a normaliser can be subtracted."""
    return float(max(torch.finfo(dtype).min / 2, -1e30))
