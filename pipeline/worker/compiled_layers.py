"""A model's layers, compiled for a GPU: norms, rotations and activations of a layer become a few kernels, and
projections of the same input one matrix product."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from transformers.modeling_layers import GradientCheckpointingLayer  # what every decoder layer is derived from

from pipeline.worker.joined_projections import join_projections
from pipeline.worker.quantised import largest_quantised

RECOMPILATIONS = 64  # shapes and kinds of layers, over all models of a process


def can_be_compiled(model: Any) -> bool:
    """Whether a model's layers are compiled. Those of quantised ones, with kernels of other packages, are not."""
    return largest_quantised(model) == 0


@contextmanager
def of_many_shapes() -> Iterator[None]:
    """Raise torch's limit of compilations per function. Beyond the limit torch silently runs the function uncompiled,
    which is slower and gives other bits."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
        yield


class CompiledLayers:
    """The layers of a model, compiled for each shape; one compilation serves all layers, as they are alike.

    Args:
        model: a transformers model; its projections are joined.
    """

    def __init__(self, model: Any) -> None:
        join_projections(model)
        # torch's advice for float32: products with fewer bits, which would not be those of a CPU
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        self._layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self._forwards: list[Callable[..., Any]] = []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the compiled layers within the block; outside it the model computes as before."""
        if not self._forwards:
            self._forwards = [torch.compile(layer.forward, dynamic=False) for layer in self._layers]
        try:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward
            with of_many_shapes():
                yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)
