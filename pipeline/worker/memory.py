"""Free memory of a device."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from pipeline.protocol.messages import MemoryBudget


def budget_of(device: torch.device, slot_bytes: int, *, reserved_bytes: int = 0) -> MemoryBudget:
    """The budget of slots of `slot_bytes` bytes, with what is free on the device now.

    Args:
        device: where the slots are.
        slot_bytes: of one slot.
        reserved_bytes: that the host takes beside its slots, however many they are.
    """
    is_gpu = device.type == "cuda"
    place = str(torch.cuda.get_device_properties(device).uuid) if is_gpu else _machine()
    return MemoryBudget(place, device.type, slot_bytes, max(0, free_bytes(device) - reserved_bytes))


def _machine() -> str:
    """Identifies the machine, across its containers: they share its memory."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # no Linux
        return platform.node()


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on the device; on a CPU what is free or can be freed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
