"""Capacity of the buffers of a cache row.

Buffers grow in a few sizes, so that they are rarely copied and graphs that were captured over them stay valid. Sizes
between the powers of 2 keep the unused part of a long row's buffer below a third.
"""

from __future__ import annotations

CAPACITY_STEP = 256  # tokens


def capacity_for(num_tokens: int) -> int:
    """The capacity in tokens for a row of `num_tokens`: 256, 512, 768, 1,024, 1,536, 2,048 and so on."""
    num_blocks = max(1, -(-num_tokens // CAPACITY_STEP))
    power = 1 << (num_blocks - 1).bit_length()
    between = power * 3 // 4
    return CAPACITY_STEP * (between if num_blocks <= between else power)
