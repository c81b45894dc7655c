"""Measure the memory that solving takes on top of its input, in a process of its own."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import cage

WHOLE_SHAPE = (64, 4, 151_936)
_STATUS = Path("/proc/self/status")
_KIB = 1024


def measure_memory(shape: tuple[int, int, int] = WHOLE_SHAPE) -> dict[str, Any] | None:
    """Return the peak memory of one solve in float32 as a multiple of its input; None where the kernel keeps no peak.

    Input are base_logprobs [B, V] and values [B, J, V]; the peak is of the process's resident memory, the policy
    that is returned included.
    """
    if not _STATUS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh_process:
        return fresh_process.submit(_solve_and_watch, shape).result()


def _solve_and_watch(shape: tuple[int, int, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    num_rows, num_principals, num_tokens = shape
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(num_rows, num_tokens).normal_(generator=generator).mul_(3.0)
    values = torch.empty(num_rows, num_principals, num_tokens).normal_(generator=generator)
    few = cage.Game(base[:2, :5000].contiguous(), values[:2, :, :5000].contiguous(), 0.5)
    cage.solve(few)  # what a first call loads is not what solving takes
    before = _peak_bytes()
    solution = cage.solve(cage.Game(base, values, 0.5))
    grown = _peak_bytes() - before
    input_bytes = base.nbytes + values.nbytes
    return {
        "rows": num_rows,
        "principals": num_principals,
        "tokens": num_tokens,
        "input_mib": input_bytes / 2**20,
        "peak_mib": grown / 2**20,
        "peak_of_input": grown / input_bytes,
        "converged": (solution.status == cage.Status.CONVERGED).double().mean().item(),
    }


def _peak_bytes() -> int:
    """Return this process's own peak; ru_maxrss would begin at its parent's."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * _KIB
