"""Numbers on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(
    numbers: Sequence[float] | Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers on the device; the host does not wait for a GPU to take them."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
