"""Seconds of work on a device, measured there: a process that does not wait for a GPU cannot measure it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.attention.transfers import on_device

_MOST_OPEN = 256  # measurements that are kept before those that are done are read


class Stopwatch:
    """Adds up the seconds of its `running` blocks.

    On a GPU events are recorded before and after the work, and read when they are done: measuring never waits.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the work within the block, also where a GPU only begins it there."""
        if self._device.type != "cuda":
            started_s = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started_s
            return
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with on_device(self._device):
            started.record()
            yield
            ended.record()
        self._open.append((started, ended))
        while len(self._open) > _MOST_OPEN and self._open[0][1].query():  # type: ignore[no-untyped-call]
            self._read_one()

    @property
    def seconds(self) -> float:
        """Seconds so far; waits for work that still runs."""
        while self._open:
            self._open[-1][1].synchronize()
            self._read_one()
        return self._seconds

    def _read_one(self) -> None:
        started, ended = self._open.popleft()
        self._seconds += started.elapsed_time(ended) / 1e3
