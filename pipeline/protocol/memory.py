"""How many slots the memories of all hosts have room for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pipeline.protocol.messages import MemoryBudget

# More rows than this gain little speed: a CPU is busy with fewer, on a GPU the cache is read longer than the weights.
MOST_SLOTS = {"cpu": 32, "cuda": 256}
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of what is free: a machine's memory may be for other processes, too


def slots_that_fit(budgets: Iterable[MemoryBudget]) -> int:
    """Slots for which there is memory everywhere, for all the hosts that share it; at least 1."""
    by_place: dict[str, list[MemoryBudget]] = defaultdict(list)
    for budget in budgets:
        by_place[budget.place].append(budget)
    return max(1, min(map(_fitting, by_place.values())))


def _fitting(budgets: Sequence[MemoryBudget]) -> int:
    """Slots that one memory holds."""
    device_type = budgets[0].device_type
    free = SHARE[device_type] * min(budget.free_bytes for budget in budgets)
    needed = sum(budget.slot_bytes for budget in budgets)
    return min(MOST_SLOTS[device_type], int(free // max(needed, 1)))
