"""Free memory of a device, and what a loaded model takes of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pipeline.hub.model_facts import facts_of_config
from pipeline.protocol.memory import HostMemory, PassSizes, available_bytes
from pipeline.protocol.messages import MemoryBudget
from pipeline.worker.quantised import largest_quantised


def budget_of(
    devices: Sequence[torch.device],
    memory_of: Callable[..., HostMemory],
    *,
    bytes_per_token: Mapping[torch.device, int],
    bytes_per_row: Mapping[torch.device, int] = MappingProxyType({}),
) -> MemoryBudget:
    """The budget of a host, with what is free on its devices now.

    Args:
        devices: of the host.
        memory_of: what it takes on a device where its layers keep `cache_bytes_per_token` and `state_bytes_per_row`.
        bytes_per_token: of one row in the cache, by device.
        bytes_per_row: of one row's states, by device.
    """
    first, *others = [
        _budget_on(
            device,
            memory_of(
                cache_bytes_per_token=bytes_per_token.get(device, 0),
                state_bytes_per_row=bytes_per_row.get(device, 0),
            ),
        )
        for device in devices
    ]
    return replace(first, others=tuple(others))


def _budget_on(device: torch.device, memory: HostMemory) -> MemoryBudget:
    is_gpu = device.type == "cuda"
    place = str(torch.cuda.get_device_properties(device).uuid) if is_gpu else _machine()
    free = free_bytes(device)
    return MemoryBudget(place, device.type, memory.slot_bytes, free, reserved_bytes=memory.reserved_bytes)


def pass_sizes(model: Any, vocab_size: int = 0) -> PassSizes:
    """What a pass of a loaded model takes.

    Args:
        model: of transformers.
        vocab_size: logits that are kept.
    """
    facts = facts_of_config(model.config, model.config.model_type)
    hidden_size = facts.hidden_size or model.get_input_embeddings().weight.shape[-1]
    return PassSizes(
        hidden_size,
        facts.mlp_size or 4 * hidden_size,
        facts.attention_size,
        vocab_size,
        model.dtype.itemsize,
        facts.head_dim or 0,
        largest_quantised(model),
    )


def _machine() -> str:
    """Identifies the machine, across its containers: they share its memory."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # no Linux
        return platform.node()


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on the device; on a CPU what is free or can be freed."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
