"""GPUs that a run can be planned for without being there: sizes and speeds from their makers' data sheets.

Memory is the data sheet's, in powers of ten: what a driver and the libraries keep is left out by that. Speeds are
those of dense matrices in bfloat16 (float16 where a GPU has none), without sparsity.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU.

    Args:
        name: as `--gpu` takes it.
        memory_bytes: of the device.
        bytes_per_s: of its memory.
        flops: floating-point operations a second.
        capability: NVIDIA's compute capability.
        source: where the figures are from.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops: float
    capability: tuple[int, int]
    source: str


def _gpu(
    name: str, gb: float, gb_per_s: float, teraflops: float, capability: tuple[int, int], source: str
) -> tuple[str, Gpu]:
    return name, Gpu(name, int(gb * 1e9), gb_per_s * 1e9, teraflops * 1e12, capability, source)


GPUS: Mapping[str, Gpu] = dict(
    [
        _gpu("t4-16gb", 16, 320, 65, (7, 5), "NVIDIA T4 data sheet (float16)"),
        _gpu("v100-32gb", 32, 900, 125, (7, 0), "NVIDIA V100 data sheet, SXM2 (float16)"),
        _gpu("rtx3090-24gb", 24, 936, 71, (8, 6), "NVIDIA Ampere GA102 white paper"),
        _gpu("a10-24gb", 24, 600, 125, (8, 6), "NVIDIA A10 data sheet"),
        _gpu("a6000-48gb", 48, 768, 155, (8, 6), "NVIDIA RTX A6000 data sheet"),
        _gpu("a100-40gb", 40, 1555, 312, (8, 0), "NVIDIA A100 data sheet, SXM"),
        _gpu("a100-80gb", 80, 2039, 312, (8, 0), "NVIDIA A100 data sheet, SXM"),
        _gpu("l4-24gb", 24, 300, 121, (8, 9), "NVIDIA L4 data sheet"),
        _gpu("rtx4090-24gb", 24, 1008, 165, (8, 9), "NVIDIA Ada GPU architecture white paper"),
        _gpu("l40s-48gb", 48, 864, 362, (8, 9), "NVIDIA L40S data sheet"),
        _gpu("h100-80gb", 80, 3350, 989, (9, 0), "NVIDIA H100 data sheet, SXM"),
        _gpu("h200-141gb", 141, 4800, 989, (9, 0), "NVIDIA H200 data sheet, SXM"),
        _gpu("b200-180gb", 180, 8000, 2250, (10, 0), "NVIDIA DGX B200 data sheet, a GPU of eight"),
    ]
)


def find_gpu(name: str) -> Gpu:
    """A kind of GPU by its name. Raises ConfigurationError with those that are known."""
    if (gpu := GPUS.get(name.lower())) is not None:
        return gpu
    close = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigurationError(f"no GPU {name} is known; {hint}known are {', '.join(GPUS)}")
