"""CUDA graphs: work on a GPU that is captured once and replayed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Set
from typing import Any, Generic, TypeVar

import torch

from pipeline.garbage import collection_paused

WARM_RUNS = 2  # before a capture: libraries set themselves up in their first calls, compilers compile

Result = TypeVar("Result")


class GraphPool:
    """Runs functions without arguments, which read and write tensors at fixed addresses.

    On a GPU each is captured at its first call and then replayed. If one cannot be captured there is one warning, and
    from then on all of them are called without graphs.

    Args:
        device: where they run.
        what: names them in the warning.
        captures: False: functions are called every time.
    """

    def __init__(self, device: torch.device, what: str, *, captures: bool = True) -> None:
        self._device = device
        self._what = what
        self._captures = captures and device.type == "cuda"
        self._graphs: dict[Hashable, CapturedGraph[Any]] = {}

    @property
    def captured(self) -> Set[Hashable]:
        """The names of the functions that are captured now."""
        return self._graphs.keys()

    def clear(self) -> None:
        """Drop all graphs, because the tensors that they read have moved."""
        self._graphs.clear()

    def run(self, name: Hashable, function: Callable[[], Result]) -> Result:
        """Call the function, or replay it; a replay returns the same tensors every time.

        Args:
            name: of the function; calls with one name must have equal functions.
            function: is called for the capture, or every time without one.

        Raises:
            torch.OutOfMemoryError: there is no memory for the capture, which is tried again by the next call.
        """
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
    """What a function does on a GPU, captured.

    Args:
        function: has no arguments; it reads and writes tensors at fixed addresses.
        device: the GPU.

    Raises:
        RuntimeError: the function cannot be captured, for example because it waits for the device.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device) -> None:
        main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                function()
        main.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        gc.collect()  # a graph or tensor that is freed during a capture would make it fail
        with collection_paused(), torch.cuda.graph(self._graph):
            self._result = function()

    def replay(self) -> Result:
        """Run the captured work; the results are in the same tensors every time."""
        self._graph.replay()
        return self._result
