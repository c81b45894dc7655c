"""How many rows a device has memory for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# More rows than this gain little speed: a CPU is busy with fewer, on a GPU the cache is read longer than the weights.
MOST_SLOTS = {"cpu": 32, "cuda": 256}
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of what is free: a machine's memory may be for other processes too


def slots_that_fit(slot_bytes: int, device: torch.device) -> int:
    """Slots of `slot_bytes` bytes that fit into what is free now; at least 1."""
    free = SHARE[device.type] * free_bytes(device)
    return max(1, min(MOST_SLOTS[device.type], int(free // max(slot_bytes, 1))))


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
