"""What a host takes of its device's memory, and how many slots fit: one arithmetic for plans and for loaded hosts."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.protocol.capacity import capacity_for
from pipeline.protocol.messages import (
    CHUNK,
    DRAFTED_PER_PASS,
    PASS_ROWS,
    PROMPT_TOKENS_PER_STEP,
    MemoryBudget,
)

# More rows than this gain little speed: a CPU is busy with fewer, on a GPU the cache is read longer than the weights.
MOST_SLOTS = {"cpu": 32, "cuda": 256}
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of what is free: a machine's memory may be for other processes, too
LONG_PROMPT = 1024  # tokens of a prompt for which "auto" leaves memory in every slot
LOGITS_COPIES = 4  # the newest logits, and those of a step while candidates are found
PROMPT_SHAPE = 256  # tokens of a pass over prompts alone, where passes have fixed shapes
FLOAT_BYTES = 4
ID_BYTES = 2 * 8


@dataclass(frozen=True, slots=True)
class PassSizes:
    """What decides how much memory a pass of a model takes.

    Args:
        hidden_size: width of a hidden state.
        mlp_size: width inside a feed-forward layer; of experts, of all that one token goes through.
        attention_size: numbers of one token's queries, keys and values.
        vocab_size: logits that are kept; 0 where only hidden states are.
        element_bytes: of a number that is computed with.
        head_dim: of one head, for which positions are rotated.
        expanded_numbers: of the largest quantised matrix, which is made ordinary while it is multiplied; 0: none.
    """

    hidden_size: int
    mlp_size: int
    attention_size: int
    vocab_size: int
    element_bytes: int
    head_dim: int = 0
    expanded_numbers: int = 0

    @property
    def token_bytes(self) -> int:
        """What one token of a pass takes at most while a layer computes it.

        The residual and the normed states, what the layer has in between (gate, up and their product, or queries,
        keys, values and what attention gives), in float32 a copy of the states, in which norms are computed, and the
        rotation of its position; its id and its position as well.
        """
        between = max(3 * self.mlp_size, 2 * self.attention_size)
        in_float = self.hidden_size + 2 * self.head_dim
        return self.element_bytes * (3 * self.hidden_size + between) + FLOAT_BYTES * in_float + ID_BYTES

    @property
    def expanded_bytes(self) -> int:
        """What the largest quantised matrix takes while it is an ordinary one."""
        return self.expanded_numbers * self.element_bytes


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What a host takes beside its weights.

    Args:
        slot_bytes: of one slot: keys and values, states, logits, and its rows of a pass.
        reserved_bytes: however many slots there are: a pass over prompts, kept rows, an expanded matrix.
    """

    slot_bytes: int
    reserved_bytes: int


def logits_bytes(vocab_size: int) -> int:
    """Bytes that the logits of one role of one slot take, copies of a step included."""
    return LOGITS_COPIES * vocab_size * FLOAT_BYTES


def rows_beside_slots(num_roles: int, *, has_fixed_shapes: bool, drafts: bool) -> int:
    """Rows of a pass beside those of slots, at most: of proposed tokens, or those that fill a tile.

    Args:
        num_roles: rows of a slot.
        has_fixed_shapes: whether passes have fixed shapes, in which proposed tokens have no rows of their own.
        drafts: whether passes verify proposed tokens.
    """
    return PASS_ROWS - 1 if has_fixed_shapes else DRAFTED_PER_PASS * num_roles * drafts


def memory_of_host(
    passes: PassSizes,
    *,
    num_roles: int,
    row_tokens: int,
    cache_bytes_per_token: int,
    state_bytes_per_row: int = 0,
    num_kept: int = 0,
    scored_tokens: int = 0,
    num_more_rows: int = 0,
    device_type: str = "cpu",
    num_ranks: int = 1,
) -> HostMemory:
    """What a host takes beside its weights; of each rank, where several hold a part of the model each.

    Args:
        passes: what a pass takes.
        num_roles: rows of a slot.
        row_tokens: of the longest row that is to fit.
        cache_bytes_per_token: keys and values of one token of one row, over all layers.
        state_bytes_per_row: of models that keep states.
        num_kept: rows beside the slots, which keep what others copy.
        scored_tokens: of models that score branches: tokens that one row reads to score its candidates; 0: of others,
            which keep logits instead.
        num_more_rows: rows of a pass beside those of slots; see `rows_beside_slots`.
        device_type: "cpu" or "cuda", where passes are captured as CUDA graphs, each with memory of its own.
        num_ranks: devices that share every layer of the model.
    """
    row_bytes = capacity_for(row_tokens) * cache_bytes_per_token // num_ranks + state_bytes_per_row
    is_captured = device_type == "cuda" and not scored_tokens
    prompt_tokens = PROMPT_SHAPE if is_captured else max(PROMPT_TOKENS_PER_STEP, num_roles * CHUNK)
    if scored_tokens:  # hidden states, and logits of models that have them, are kept in float32 for the scores
        kept = FLOAT_BYTES * (passes.hidden_size + 2 * passes.vocab_size)
        of_row = scored_tokens * (passes.token_bytes + kept)
    else:
        of_row = passes.token_bytes + logits_bytes(passes.vocab_size)
    slot_bytes = num_roles * (row_bytes + of_row)
    reserved = prompt_tokens * passes.token_bytes + passes.expanded_bytes + num_kept * row_bytes
    reserved += num_more_rows * (passes.token_bytes + logits_bytes(passes.vocab_size))
    return HostMemory(slot_bytes, reserved)


def available_bytes() -> int:
    """Bytes of main memory that are free or can be freed."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def slots_that_fit(budgets: Iterable[MemoryBudget]) -> int:
    """The largest number of slots that fits everywhere; at least 1.

    Args:
        budgets: of every host of a replica, and of every rank of a host. Those in one place share its memory.
    """
    by_place: dict[str, list[MemoryBudget]] = defaultdict(list)
    for budget in budgets:
        for each in (budget, *budget.others):
            by_place[each.place].append(each)
    return max(1, min(min(MOST_SLOTS[each[0].device_type], room_for_slots(each)) for each in by_place.values()))


def room_for_slots(budgets: Sequence[MemoryBudget]) -> int:
    """The number of slots for which one memory has room; below 1 where there is room for none.

    Args:
        budgets: of the hosts that share the memory.
    """
    free = SHARE[budgets[0].device_type] * min(budget.free_bytes for budget in budgets)
    free -= sum(budget.reserved_bytes for budget in budgets)
    return int(free // max(sum(budget.slot_bytes for budget in budgets), 1))
