"""A replica whose machine is about to go: it finishes what it is decoding, begins nothing new, and ends its process.

Ray tells of such machines: spot machines that got their notice, and machines that are drained by hand. It starts a
process that has ended on another machine, and repeats there the calls that were held back here. What is not done
when the machine goes is decoded again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.util.placement_group import PlacementGroup

from pipeline.cluster.board import ask
from pipeline.cluster.placement import draining_nodes, nodes_of
from pipeline.errors import CageError

CHECK_S = 5.0


class Departure:
    """Watches the machines of a replica.

    Args:
        place: of its hosts.
        actor: its id.
        node: the machine of its own process.
        board: where it says goodbye, an actor handle.
    """

    def __init__(self, place: PlacementGroup, actor: str, node: str, board: Any) -> None:
        self._place = place
        self._actor = actor
        self._node = node
        self._board = board
        self._lock = threading.Lock()
        self._num_shards = 0
        self._is_leaving = False
        threading.Thread(target=self._watch, name="departure", daemon=True).start()

    @contextmanager
    def unless_leaving(self) -> Iterator[None]:
        """Work on a shard for as long as the block runs. Where the machine is about to go, the block never begins."""
        with self._lock:
            is_leaving = self._is_leaving
            self._num_shards += not is_leaving
        if is_leaving:
            threading.Event().wait()  # until the process ends; the call is then repeated elsewhere
        try:
            yield
        finally:
            with self._lock:
                self._num_shards -= 1

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(CHECK_S):
            if not self._is_leaving and draining_nodes() & {self._node, *nodes_of(self._place)}:
                with self._lock:
                    self._is_leaving = True
            if self._is_leaving and not self._num_shards:
                with contextlib.suppress(CageError):
                    ask(self._board.leave.remote(self._actor))
                os._exit(1)  # Ray starts the replica again; a process that ends of its own accord it would not
