"""The devices of a host, and the type that it computes in there."""

from __future__ import annotations

import torch

from pipeline.errors import ConfigurationError
from pipeline.protocol.specs import HostSpec


def pick_device(device: str) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device {device} is not available: torch finds no GPU; use auto or cpu")
    return torch.device(device)


def pick_devices(spec: HostSpec) -> tuple[torch.device, ...]:
    """The devices of a host: as many GPUs as its layers are spread over, from the configured one on.

    Raises:
        ConfigurationError: there are not as many.
    """
    count = spec.pipeline_parallel
    if count == 1:
        return (pick_device(spec.device),)
    first = torch.device("cuda" if spec.device == "auto" else spec.device)
    start, num_gpus = first.index or 0, torch.cuda.device_count()
    if first.type == "cpu" or (first.type == "cuda" and num_gpus < start + count):
        from_on = f" from {first} on" if start else ""
        raise ConfigurationError(
            f"{spec.title}: pipeline_parallel: {count} needs {count} GPUs{from_on}, and torch finds {num_gpus}; set "
            "it to the number of GPUs, or leave it out on a CPU"
        )
    return tuple(torch.device(first.type, start + at) for at in range(count))


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU, where bfloat16 is slower, and bfloat16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
