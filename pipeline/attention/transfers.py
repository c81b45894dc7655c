"""Numbers on their way to a device, and work that belongs to one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def to_device(
    numbers: Sequence[float] | Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers on the device; the host does not wait for a GPU to take them."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make it the current one where there are several: streams, events and kernels are of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
