"""What a stage ran on."""

from __future__ import annotations

import platform
from pathlib import Path

GPUS = Path("/proc/driver/nvidia/gpus")
PROCESSOR = Path("/proc/cpuinfo")


def machine(gpus: Path = GPUS, processor: Path = PROCESSOR) -> str:
    """The name of the GPU, or else of the processor, where the system says it."""
    files = [*sorted(gpus.glob("*/information")), processor]
    for file, key in zip(files, ["Model"] * (len(files) - 1) + ["model name"], strict=True):
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        if names := [line.partition(":")[2].strip() for line in lines if line.startswith(key)]:
            return names[0]
    return platform.machine()
