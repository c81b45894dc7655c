"""Work on a GPU that is recorded once and replayed: a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

WARM_RUNS = 2  # before a recording: libraries set themselves up in their first calls, compilers compile

Result = TypeVar("Result")


class Recording(Generic[Result]):
    """What a function of no arguments does on a device; it reads and writes tensors that stay where they are.

    Raises RuntimeError where the function cannot be recorded: it waits for the device, say.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device) -> None:
        main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                function()
        main.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        gc.collect()  # what is let go during a recording would end it
        with _no_collection(), torch.cuda.graph(self._graph):
            self._result = function()

    def replay(self) -> Result:
        """Do it again; the results are in the same tensors every time."""
        self._graph.replay()
        return self._result


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
