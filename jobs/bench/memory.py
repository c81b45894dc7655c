"""Measure the memory that solving takes on top of its input."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import cage

FULL_VOCABULARY_SHAPE = (64, 4, 151_936)


def measure_memory(shape: tuple[int, int, int] = FULL_VOCABULARY_SHAPE) -> dict[str, Any]:
    """Return the most memory that tensors hold at once during one solve in float32, beside that of the input.

    shape: rows, principals, tokens.

    The input is base_logprobs [B, V] and values [B, J, V]. The peak counts the policy [B, V] that is returned. It
    comes from the allocator's own events: the peak that the kernel reports for a process may be off by a hundred
    megabytes.
    """
    num_rows, num_principals, num_tokens = shape
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(num_rows, num_tokens).normal_(generator=generator).mul_(3.0)
    values = torch.empty(num_rows, num_principals, num_tokens).normal_(generator=generator)
    game = cage.Game(base, values, 0.5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        solution = cage.solve(game)
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak_bytes = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    input_bytes = base.nbytes + values.nbytes
    return {
        "rows": num_rows,
        "principals": num_principals,
        "tokens": num_tokens,
        "input_mib": input_bytes / 2**20,
        "policy_mib": solution.log_policy.nbytes / 2**20,
        "peak_mib": peak_bytes / 2**20,
        "peak_of_input": peak_bytes / input_bytes,
        "converged": (solution.status == cage.Status.CONVERGED).double().mean().item(),
    }
