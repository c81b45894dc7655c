"""Which replica works on which shard, how often each was begun, and who may wait for a machine.

On a cluster whose machines come and go a replica can lose its place. Ray Data has handed it shards by then, and
repeats these calls on the same replica once that starts again, and nowhere else. So a replica without a place waits
for one only as long as others are at work: then it gives its shards up, and the stream runs them again.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from enum import Enum

QUIET_S = 10.0  # nobody else is at work once all have been without a shard for so long


class Waiting(Enum):
    """What a replica without a place is to do."""

    GO_ON = "wait for a place"
    GIVE_UP_SHARDS = "return the shards, so that others decode them"
    END_RUN = "the cluster is too small"


class Assignments:
    """The shards that replicas have begun, by the replicas' numbers.

    Args:
        fewest: replicas without which the run ends.
        most: replicas at the same time.
        start_timeout_s: how long there may be fewer than `fewest`.
        clock: monotonic seconds.
    """

    def __init__(
        self, fewest: int, most: int, *, start_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fewest, self._most = fewest, most
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._attempts: Counter[int] = Counter()
        self._begun: defaultdict[int, set[int]] = defaultdict(set)
        self._placed: set[int] = set()
        self._num_starts = 0
        self._changed_s = self._enough_s = clock()

    def start(self) -> int:
        """Count a start of a replica; how many there were since a shard was last done, this one included."""
        self._num_starts += 1
        return self._num_starts

    def begin(self, shard: int, replica: int | None = None) -> int:
        """Count an attempt of a shard; how many there were, this one included."""
        self._attempts[shard] += 1
        if replica is not None:
            self._begun[replica].add(shard)
            self._changed_s = self._clock()
        return self._attempts[shard]

    def end(self, shard: int, replica: int, *, was_given_up: bool = False) -> None:
        """A replica is done with a shard; one that it gave up for want of a place does not count as an attempt."""
        self._begun[replica].discard(shard)
        self._changed_s = self._clock()
        if was_given_up:
            self._attempts[shard] -= 1
        else:
            self._num_starts = 0

    def take_over(self, replica: int) -> None:
        """Another process has a replica's number: shards of the one before are not its own."""
        self._begun[replica].clear()
        self.lose_place(replica)

    def lose_machine(self, replica: int) -> None:
        """A replica's machine is gone. That is not the fault of its shards, so the attempts do not count."""
        for shard in self._begun[replica]:
            self._attempts[shard] -= 1
        self.lose_place(replica)

    def get_place(self, replica: int) -> None:
        """A replica's hosts have their place."""
        self._placed.add(replica)
        if len(self._placed) >= self._fewest:
            self._enough_s = self._clock()

    def lose_place(self, replica: int) -> None:
        """A replica's hosts wait for a place."""
        if len(self._placed) >= self._fewest:
            self._enough_s = self._clock()
        self._placed.discard(replica)

    def wait(self, replica: int, waited_s: float) -> Waiting:
        """What a replica is to do that has waited for a place for so long."""
        self.lose_place(replica)
        now_s = self._clock()
        if self._fewest == self._most:
            return Waiting.END_RUN if waited_s >= self._start_timeout_s else Waiting.GO_ON
        others_work = any(self._begun[other] for other in self._placed)
        if self._begun[replica] and self._placed and not others_work and now_s - self._changed_s >= QUIET_S:
            return Waiting.GIVE_UP_SHARDS
        too_few_s = 0.0 if len(self._placed) >= self._fewest else min(waited_s, now_s - self._enough_s)
        return Waiting.END_RUN if too_few_s >= self._start_timeout_s else Waiting.GO_ON
