"""What a CUDA graph does, on a CPU: operations are written down once and done again, to the same tensors.

Whatever a function looked up, counted or decided while it was written down stays so. What a GPU could not do during a
capture is refused: reading numbers back, and bringing some over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.worker.cuda_graphs import WARM_RUNS

REFUSED = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique"}


class Tape(TorchDispatchMode):
    """Writes down all operations in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").split(".")[0]
        masks = name.startswith("index") and any(part.dtype is torch.bool for part in _tensors(args[1:]))
        # of lists; a single number goes along with the kernel that takes it
        brings = name == "lift_fresh" and args[0].dim() > 0
        if name in REFUSED or masks or brings:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out


class TapeGraph:
    """In the place of a `CapturedGraph`."""

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        for _ in range(WARM_RUNS):
            function()
        with Tape() as tape:
            self._result = function()
        self._operations = tape.operations

    def replay(self) -> Any:
        for function, args, kwargs, out in self._operations:
            for old, new in zip(_tensors(out), _tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self._result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
