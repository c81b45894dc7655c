"""What a stage ran on."""

from __future__ import annotations

import platform
from pathlib import Path

GPUS = Path("/proc/driver/nvidia/gpus")
PROCESSOR = Path("/proc/cpuinfo")


def machine(gpus: Path = GPUS, processor: Path = PROCESSOR) -> str:
    """The name of the GPU, or else of the processor, where the system says it."""
    told = [(file, "Model") for file in sorted(gpus.glob("*/information"))] + [(processor, "model name")]
    names = [
        line.partition(":")[2].strip()
        for file, key in told
        if file.exists()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith(key)
    ]
    return names[0] if names else platform.machine()
