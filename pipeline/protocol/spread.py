"""How a model's layers are spread over several devices: one arithmetic for plans and for loaded hosts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def spread(layer_bytes: Sequence[int], num_devices: int, *, first_bytes: int = 0) -> tuple[int, ...]:
    """How many layers each device has, in order and at least one: the fullest one holds as little as can be.

    Args:
        layer_bytes: weights of each layer.
        num_devices: at most as many as layers.
        first_bytes: what the first device holds beside its layers.
    """
    num_layers = len(layer_bytes)
    assert 1 <= num_devices <= num_layers
    before = [0, *accumulate(layer_bytes)]
    # by the number of layers: the fullest device, the sum of squares (of equal ones the most even), and the counts
    best: list[tuple[int, int, tuple[int, ...]] | None] = [(0, 0, ())] + [None] * num_layers
    for device in range(num_devices):
        found: list[tuple[int, int, tuple[int, ...]] | None] = [None] * (num_layers + 1)
        for stop in range(device + 1, num_layers + 1):
            for start in range(device, stop):
                if (held := best[start]) is None:
                    continue
                own = before[stop] - before[start] + (first_bytes if device == 0 else 0)
                option = max(held[0], own), held[1] + own * own, (*held[2], stop - start)
                kept = found[stop]
                if kept is None or option < kept:
                    found[stop] = option
        best = found
    chosen = best[num_layers]
    assert chosen is not None
    return chosen[2]
