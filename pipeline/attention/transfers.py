"""Copies of numbers to a device, and work that belongs to one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

NOTHING = nullcontext()


def to_device(
    numbers: Sequence[float] | Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Copy numbers to the device, without waiting for a GPU.

    The copy runs behind what the GPU was given before. From memory that is not pinned it would make the CPU wait.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make it the current device: streams, events and kernels belong to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else NOTHING
