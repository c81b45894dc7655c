"""The processes that train together, and what one of them finds out for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from pipeline.errors import CageError

MOST_WAIT = timedelta(days=30)  # the launcher ends those who wait for a process that has died


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one training, as seen by one of them. `accelerate launch` starts one for each device.

    Args:
        rank: of this one, from 0; process 0 is the main one.
        count: all of them.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, name: str, find: Callable[[], Any]) -> Any:
        """What the main process finds, in all processes; the others wait for it.

        Args:
            name: of what is found, for messages; each name is shared once.
            find: called in the main process alone; gives what JSON can hold.

        Raises:
            CageError: in the others, where `find` raised; the main process raises that error itself.
        """
        if self.count == 1:
            return find()
        store, key = _store(self.rank, self.count), f"cage/{name}"
        if not self.is_main:
            store.wait([key], MOST_WAIT)
            told = json.loads(store.get(key))
            store.set(f"{key}/{self.rank}", "read")
            if "error" in told:
                raise CageError(f"the main process has no {name}: {told['error']}")
            return told["found"]
        try:
            found = find()
        except Exception as error:
            store.set(key, json.dumps({"error": str(error) or type(error).__name__}))
            # where there is no launcher the store ends with this process
            store.wait([f"{key}/{rank}" for rank in range(1, self.count)], MOST_WAIT)
            raise
        store.set(key, json.dumps({"found": found}))
        return found


ALONE = Processes()


@cache
def _store(rank: int, count: int) -> Any:
    """The store by which the process group is formed later; kept, as the main process may be the one that serves it.

    Unlike operations of a group, waiting for a key has no limit of its own: a judge may take hours.
    """
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", rank, count))[0]
