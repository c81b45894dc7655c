"""Language model runners over tiny models, and what they compute after a few given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline.hub.sources import resolve_adapter, resolve_model
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.specs import HostSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker import forward_passes
from pipeline.worker.compiled_layers import CompiledLayers
from pipeline.worker.language_model_runner import LanguageModelRunner
from pipeline.worker.loading import load_language_model

VOCAB_SIZE = 261  # of the tiny models
ROLES = (HostRole("a"), HostRole("b"))
SKIPS = {"a": 0, "b": 1}  # so that the two roles read prompts of different lengths
ADAPTER_ROLES = (HostRole("a"), HostRole("b", "one"), HostRole("c", "two"))
ADAPTER_SKIPS = {"a": 0, "b": 0, "c": 0}

# batches by row and slot: rows come and go, and the second prompt outgrows its buffer
CHANGING_PROMPTS = ([3, 9, 4], list(range(250)), [7] * 30, [5, 6], [8] * 12)
CHANGING_BATCHES = ({0: 2, 1: 0, 2: 3}, {1: 1}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4})


def spec_of(
    folder: Path,
    *,
    strict: bool = True,
    num_slots: int = 6,
    roles: Sequence[HostRole] = ROLES,
    adapters: Mapping[str, Path] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> HostSpec:
    """How to start a host of a tiny model, with adapters by name."""
    return HostSpec(
        name="base",
        serves=("base",),
        source=resolve_model(str(folder), cache_folder=folder),
        dtype=dtype,
        device=device,
        roles=tuple(roles),
        num_slots=num_slots,
        vocab_size=VOCAB_SIZE,
        strict=strict,
        cache_folder=folder,
        adapters={name: resolve_adapter(str(path), cache_folder=folder) for name, path in (adapters or {}).items()},
    )


def load_in_slots(spec: HostSpec, *, has_fixed_shapes: bool | None = None) -> LanguageModelRunner:
    """The runner of a model that is decoded in slots, as a host loads it.

    Args:
        spec: of the host.
        has_fixed_shapes: whether passes have fixed shapes, as on a GPU; None: as the device wants.
    """
    with pytest.MonkeyPatch.context() as patch:
        if has_fixed_shapes is not None:
            patch.setattr(forward_passes, "can_build_for", lambda device: has_fixed_shapes)
        loaded = load_language_model(spec)
    assert loaded.slot_runner is not None, loaded.why_plain
    return loaded.slot_runner


def runner_of(folder: Path, *, has_fixed_shapes: bool | None = None, **options: Any) -> LanguageModelRunner:
    """The runner of a tiny model; `options` are those of `spec_of`."""
    return load_in_slots(spec_of(folder, **options), has_fixed_shapes=has_fixed_shapes)


def compile_layers(runner: LanguageModelRunner) -> Any:
    """Have passes of fixed shapes compute with compiled layers, as they do on a GPU; the model."""
    passes = runner._passes
    passes._compiled = CompiledLayers(passes._model)
    return passes._model


@contextmanager
def watching_shapes() -> Iterator[set[tuple[int, ...]]]:
    """The shapes of all token ids that models embed in the block."""
    shapes: set[tuple[int, ...]] = set()

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            shapes.add(tuple(args[0].shape))

    handle = register_module_forward_pre_hook(watch)
    try:
        yield shapes
    finally:
        handle.remove()


def logits_after(
    runner: LanguageModelRunner,
    places: Mapping[int, int],
    prompts: Sequence[Sequence[int]],
    *,
    num_steps: int = 6,
    skips: Mapping[str, int] = SKIPS,
) -> dict[int, Tensor]:
    """Log-probabilities [R, V] of some rows after a few given tokens.

    Args:
        runner: of the model.
        places: the slot of each row that runs.
        prompts: by row, those of other rows included.
        num_steps: how many tokens follow.
        skips: by role, how many first tokens of its row's prompt it does not read.
    """
    admissions = [
        Admission(slot, {role: prompts[row][first:] for role, first in skips.items()}) for row, slot in places.items()
    ]
    runner.advance(Step(admissions))
    for step in range(num_steps):
        runner.advance(Step((), list(places.values()), [(7 * row + step) % 256 for row in places]))
    logits = runner.logprobs_at(list(places.values()), None)
    return {row: logits[at].clone() for at, row in enumerate(places)}
