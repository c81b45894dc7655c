"""Matrix products on a CPU whose bits do not depend on how many rows are computed together.

A strict run promises that a row's numbers are the same alone and in any batch. Matrix kernels do not give that by
themselves: Intel's MKL chooses another kernel, and with it another order of additions, by the number of rows (on
processors with AVX-512 below 16 rows). MKL's own remedy is its strict reproducible mode, which costs 3 to 9 percent
of a product and must be chosen before MKL's first call in the process. On other processors MKL's kernels differ only
below four rows, and passes are padded to that.
"""

from __future__ import annotations

import os
from pathlib import Path

MKL_MODE = "MKL_CBWR"  # MKL reads it once, at its first call
MODE_BY_FLAG = {"avx512f": "AVX512,STRICT", "avx2": "AVX2,STRICT"}  # the best that the processor has comes first


def choose_reproducible_kernels() -> None:
    """Choose MKL's strict reproducible mode, where the processor has one and the user has not chosen a mode.

    Call it before the first matrix product of the process: afterwards it has no effect.
    """
    if (mode := reproducible_mode()) is not None:
        os.environ.setdefault(MKL_MODE, mode)


def has_reproducible_kernels() -> bool:
    """Whether MKL's strict reproducible mode was chosen: then products of any number of rows have the same bits."""
    return os.environ.get(MKL_MODE, "").endswith(",STRICT") and reproducible_mode() is not None


def reproducible_mode(processor: str | None = None) -> str | None:
    """MKL's mode for a processor, described as in /proc/cpuinfo; None where MKL has none for it.

    Args:
        processor: the description; None: of this machine.
    """
    processor = _processor() if processor is None else processor
    if "GenuineIntel" not in processor:
        return None
    flags = next((line for line in processor.splitlines() if line.startswith("flags")), "").split()
    return next((mode for flag, mode in MODE_BY_FLAG.items() if flag in flags), None)


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return ""
