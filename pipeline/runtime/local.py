"""A whole replica in one process, without Ray: for notebooks, tests and machines without a cluster."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pipeline.engine.shards import ShardDecoder, ShardOutcome, ShardOutput
from pipeline.errors import CageError, HostError
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.waits import waiting_for, waits
from pipeline.protocol.hosts import Hosts
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.engines import make_decoder
from pipeline.runtime.local_hosts import start_again, start_hosts
from pipeline.runtime.wiring import DIRECT, Wiring
from pipeline.storage.run import Run


class LocalStream:
    """Decodes shards one after another, with slots refilled across their borders.

    Args:
        assembly: the replica.
        run: where shards are read from and committed to.
        wiring: wraps the hosts.
    """

    def __init__(self, assembly: Assembly, run: Run, *, wiring: Wiring = DIRECT) -> None:
        self._assembly = assembly
        self._run = run
        self._wiring = wiring
        self._decoder: ShardDecoder | None = None

    def counts(self) -> Counts:
        """Answers, failed answers and tokens so far."""
        return Counts() if self._decoder is None else self._decoder.counts

    def error(self) -> CageError | None:
        """Nothing: what fails here is raised by `decode`."""
        return None

    def waits(self) -> list[str]:
        """What this process waits for."""
        return waits()

    def decode(self, shards: Sequence[int]) -> Generator[ShardOutcome, None, None]:
        """Decode and commit shards; yield each one's outcome when it is done.

        Raises:
            HostError: a host failed. Committed shards are kept.
        """
        hosts = start_hosts(self._assembly, wiring=self._wiring)
        self._decoder = decoder = make_decoder(self._assembly, hosts)
        waiting = list(reversed(shards))
        while waiting or not decoder.is_idle:
            while waiting and decoder.wants_shard:
                index = waiting.pop()
                if (standing := self._run.commit_of(index)) is not None:  # by another driver
                    yield ShardOutcome(index, rows=standing.rows, failed=standing.failed, was_committed=True)
                    continue
                decoder.add(index, self._run.plan.read_shard(index))
            for output in self._step(decoder, hosts):
                with waiting_for(f"the commit of shard {output.index}"):
                    record = self._run.commit(
                        output.index,
                        output.records,
                        seconds=output.seconds,
                        host="local",
                        row_ids=output.row_ids,
                        recoveries=output.recoveries,
                    )
                yield ShardOutcome(output.index, rows=record.rows, failed=record.failed)

    def _step(self, decoder: ShardDecoder, hosts: Hosts) -> list[ShardOutput]:
        """Run a step of the decoder. Where a rank of a host was lost, the same decoder goes on with new ones."""
        try:
            return decoder.step()
        except HostError as error:
            if not start_again(hosts, self._assembly):
                raise
            decoder.recover(hosts, error)
            return []
