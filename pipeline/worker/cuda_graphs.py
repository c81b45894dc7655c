"""Work on a GPU that is captured once and replayed: CUDA graphs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Set
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

WARM_RUNS = 2  # before a capture: libraries set themselves up in their first calls, compilers compile

Result = TypeVar("Result")


class GraphPool:
    """Runs functions of no arguments, which read and write tensors that stay where they are.

    On a GPU each is captured at its first call and then replayed. If one cannot be captured, a warning says so once,
    and from then on all of them are called instead.

    Args:
        device: what they run on.
        what: names them in the warning.
    """

    def __init__(self, device: torch.device, what: str) -> None:
        self._device = device
        self._what = what
        self._captures = device.type == "cuda"
        self._graphs: dict[Hashable, CapturedGraph[Any]] = {}

    @property
    def captured(self) -> Set[Hashable]:
        """The names of the functions that are captured now."""
        return self._graphs.keys()

    def clear(self) -> None:
        """Forget all graphs: what they read has moved."""
        self._graphs.clear()

    def run(self, name: Hashable, function: Callable[[], Result]) -> Result:
        """Call the function, or replay it; its result is then in the same tensors every time."""
        if self._captures and name not in self._graphs:
            try:
                self._graphs[name] = CapturedGraph(function, self._device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._captures = False
                warnings.warn(
                    f"{self._what} are not captured as CUDA graphs, which is slower: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if not self._captures:
            return function()
        result: Result = self._graphs[name].replay()
        return result


class CapturedGraph(Generic[Result]):
    """What a function of no arguments does on a device; it reads and writes tensors that stay where they are.

    Raises RuntimeError where the function cannot be captured, because it waits for the device, for example.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device) -> None:
        main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                function()
        main.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        gc.collect()  # what is freed during a capture would end it
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
