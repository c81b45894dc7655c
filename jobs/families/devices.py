"""What a family's tiny model shows when its layers are on two devices: the bits of one device, or a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from jobs.families.simulated_devices import KIND, SimulatedDevices
from pipeline.errors import ConfigurationError
from pipeline.protocol.specs import HostSpec
from pipeline.worker.hosts import LanguageRunner
from pipeline.worker.loading import load_language_model

NUM_DEVICES = 2

# greedy answers by a runner of some prompts, and each one's last log-probabilities [V] on the CPU
Decode = Callable[[LanguageRunner], tuple[list[list[int]], list[Tensor]]]


def why_not_spread(spec: HostSpec, decode: Decode, expected: Sequence[Sequence[int]]) -> str | None:
    """Why the layers of a family cannot be on two devices; None: they can.

    Args:
        spec: of its tiny model, on a CPU.
        decode: gives the answers of a runner.
        expected: the answers of one device.
    """
    with SimulatedDevices():
        whole = load_language_model(replace(spec, device=KIND))
        together, bits = decode(whole.runner)
        try:
            loaded = load_language_model(replace(spec, device=KIND, pipeline_parallel=NUM_DEVICES))
        except ConfigurationError as error:
            reason = " ".join(str(error).split()).rpartition(": ")[2].partition(";")[0]
            return f"two devices cannot run it: {reason[:160]}"
        if loaded.decoding != whole.decoding:
            return f"two devices decode it row by row: {loaded.why_plain}"
        found, spread_bits = decode(loaded.runner)
    if together != list(expected) or found != list(expected):
        return "two devices decode it otherwise than one"
    if not all(map(torch.equal, spread_bits, bits)):
        return "two devices give other bits than one"
    return None
