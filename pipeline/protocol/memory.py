"""How many slots fit into the memory of every host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pipeline.protocol.messages import MemoryBudget

# More rows than this gain little speed: a CPU is busy with fewer, on a GPU the cache is read longer than the weights.
MOST_SLOTS = {"cpu": 32, "cuda": 256}
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of what is free: a machine's memory may be for other processes, too


def slots_that_fit(budgets: Iterable[MemoryBudget]) -> int:
    """The largest number of slots that fits everywhere; at least 1.

    Args:
        budgets: of every host of a replica, and of every rank of a host. Those in one place share its memory.
    """
    by_place: dict[str, list[MemoryBudget]] = defaultdict(list)
    for budget in budgets:
        by_place[budget.place].append(budget)
    return max(1, min(map(_fitting, by_place.values())))


def _fitting(budgets: Sequence[MemoryBudget]) -> int:
    """The number of slots that fit into one memory."""
    device_type = budgets[0].device_type
    free = SHARE[device_type] * min(budget.free_bytes for budget in budgets)
    needed = sum(budget.slot_bytes for budget in budgets)
    return min(MOST_SLOTS[device_type], int(free // max(needed, 1)))
