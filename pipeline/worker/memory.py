"""How many rows devices have memory for, and how long their buffers are."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# More rows than this gain little speed: a CPU is busy with fewer, on a GPU the cache is read longer than the weights.
MOST_SLOTS = {"cpu": 32, "cuda": 256}
CAPACITY_STEP = 256  # tokens
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of what is free: a machine's memory may be for other processes too


def capacity_for(num_tokens: int) -> int:
    """Tokens that the buffers of a row with so many have room for: 256, 512, 768, 1,024, 1,536, 2,048 and so on."""
    num_blocks = max(1, -(-num_tokens // CAPACITY_STEP))
    power = 1 << (num_blocks - 1).bit_length()
    between = power * 3 // 4
    return CAPACITY_STEP * (between if num_blocks <= between else power)


@dataclass(frozen=True, slots=True)
class Room:
    """What a slot of one host takes, and what is free where it is. `place` names the memory among all machines'."""

    place: str
    device_type: str
    slot_bytes: int
    free_bytes: int

    @classmethod
    def on(cls, device: torch.device, slot_bytes: int) -> Room:
        """What is there now."""
        is_gpu = device.type == "cuda"
        place = str(torch.cuda.get_device_properties(device).uuid) if is_gpu else _machine()
        return cls(place, device.type, slot_bytes, free_bytes(device))


def slots_that_fit(rooms: Iterable[Room]) -> int:
    """Slots for which there is memory everywhere, for all the hosts that share it; at least 1."""
    by_place: dict[str, list[Room]] = defaultdict(list)
    for room in rooms:
        by_place[room.place].append(room)
    return max(1, min(map(_fitting, by_place.values())))


def _fitting(rooms: Sequence[Room]) -> int:
    """Slots that one memory holds."""
    device_type = rooms[0].device_type
    free = SHARE[device_type] * min(room.free_bytes for room in rooms)
    needed = sum(room.slot_bytes for room in rooms)
    return min(MOST_SLOTS[device_type], int(free // max(needed, 1)))


def _machine() -> str:
    """The machine, whatever the container."""
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
