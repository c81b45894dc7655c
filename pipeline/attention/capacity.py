"""How long the buffers of a cache row are."""

from __future__ import annotations

CAPACITY_STEP = 256  # tokens


def capacity_for(num_tokens: int) -> int:
    """Tokens that the buffers of a row with so many have room for: 256, 512, 768, 1,024, 1,536, 2,048 and so on."""
    num_blocks = max(1, -(-num_tokens // CAPACITY_STEP))
    power = 1 << (num_blocks - 1).bit_length()
    between = power * 3 // 4
    return CAPACITY_STEP * (between if num_blocks <= between else power)
