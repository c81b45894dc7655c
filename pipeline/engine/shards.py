"""Shards through one engine: slots refill across shard borders, a shard is done when all its rows are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from pipeline.engine.decoding import DecodingEngine
from pipeline.errors import CageError, HostError
from pipeline.monitoring.counts import Counts, Recoveries
from pipeline.monitoring.metrics import Load
from pipeline.monitoring.reasons import failures_of
from pipeline.monitoring.values import values_of
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.hosts import Hosts
from pipeline.records import Record, Row


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """The result of a shard: it is committed, or its attempts ended with an error.

    Args:
        index: of the shard.
        error: what ended its attempts; None where it is committed.
        rows: committed answers that were aligned.
        failed: committed answers without a result.
        was_committed: whether it had been committed before.
    """

    index: int
    error: CageError | None = None
    rows: int = 0
    failed: int = 0
    was_committed: bool = False


@dataclass(slots=True)
class ShardOutput:
    """A decoded shard.

    Args:
        index: of the shard.
        row_ids: its rows, in input order.
        records: in the order in which they ended.
        seconds: from when it was queued to its last record.
        recoveries: faults that were overcome since the shard before was done.
    """

    index: int
    row_ids: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    recoveries: Recoveries = field(default_factory=Recoveries)


@dataclass(slots=True)
class _OpenShard:
    """A shard that is queued or being decoded.

    Args:
        output: what is known of it.
        jobs: its answers that are not admitted yet, as (row, variant, sample).
        started_s: when it was queued.
        num_waiting: admitted answers without a record.
        is_read: whether all answers are admitted.
    """

    output: ShardOutput
    jobs: Iterator[tuple[Row, int, int]]
    started_s: float
    num_waiting: int = 0
    is_read: bool = False


class ShardDecoder:
    """Decodes shards, as many at once as are needed to keep the slots full.

    Args:
        engine: the engine; it must be idle.
        num_variants: variants per row.
        num_samples: samples per row and variant.
    """

    def __init__(self, engine: DecodingEngine, *, num_variants: int = 1, num_samples: int = 1) -> None:
        self._engine = engine
        self._answers = list(product(range(num_variants), range(num_samples)))
        self._unread: deque[_OpenShard] = deque()
        self._open: dict[str, _OpenShard] = {}
        self._finished: list[ShardOutput] = []
        self._counts = Counts()
        self._reported = Recoveries()

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        engine = self._engine
        return replace(self._counts, steps=engine.num_steps, recoveries=engine.recoveries, work=engine.work)

    @property
    def load(self) -> Load:
        """How full the engine's slots are."""
        return self._engine.load

    @property
    def wants_shard(self) -> bool:
        """Whether another shard is needed to keep the slots full."""
        return not self._unread

    @property
    def is_idle(self) -> bool:
        """Whether no shard is queued or being decoded."""
        return not self._unread and not self._open and not self._finished and self._engine.is_idle

    def add(self, index: int, rows: Iterable[Row]) -> None:
        """Queue a shard.

        Args:
            index: of the shard.
            rows: read as slots become free; ids must differ from those of all shards that are queued or running.
        """
        jobs = ((row, *answer) for row in rows for answer in self._answers)
        self._unread.append(_OpenShard(ShardOutput(index), jobs, time.monotonic()))

    def step(self) -> list[ShardOutput]:
        """Advance the engine by one step; return the shards that are done. Raises HostError: then call `recover`."""
        self._refill()
        for record in self._engine.step():
            shard = self._open[record.row_id]
            shard.output.records.append(record)
            shard.num_waiting -= 1
            self._counts += _counted(record)
            if shard.is_read and shard.num_waiting == 0:
                self._close(shard)
        finished, self._finished = self._finished, []
        return finished

    def recover(self, hosts: Hosts, error: HostError) -> None:
        """Go on with other hosts; finished rows are kept. Raises CageError where `Engine.recover` does."""
        self._engine.recover(hosts, error)

    def _refill(self) -> None:
        """Admit rows while the engine wants some; a shard without rows is done at once."""
        while self._unread and self._engine.wants_row:
            shard = self._unread[0]
            with waiting_for(f"a row of shard {shard.output.index} of the input"):
                job = next(shard.jobs, None)
            if job is not None:
                row, *answer = job
                if tuple(answer) == self._answers[0]:
                    self._open[row.row_id] = shard
                    shard.output.row_ids.append(row.row_id)
                shard.num_waiting += 1
                self._engine.admit(row, *answer)
                continue
            self._unread.popleft()
            shard.is_read = True
            if shard.num_waiting == 0:
                self._close(shard)

    def _close(self, shard: _OpenShard) -> None:
        self._open = {row_id: other for row_id, other in self._open.items() if other is not shard}
        shard.output.seconds = time.monotonic() - shard.started_s
        shard.output.recoveries = self._engine.recoveries - self._reported
        self._reported = self._engine.recoveries
        self._finished.append(shard.output)


def _counted(record: Record) -> Counts:
    """The counts of one answer."""
    failed = [(record.row_id, record.error)] if record.is_failed else []
    return Counts(1, len(failed), record.num_tokens, failures=failures_of(failed), values=values_of([record]))
