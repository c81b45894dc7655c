"""The whole replica in one process, without Ray: for notebooks, tests and machines without a cluster."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pipeline.engine.calls import agree_on_slots
from pipeline.engine.engine import Engine
from pipeline.engine.shards import ShardDecoder, ShardOutcome
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.waits import waiting_for, waits
from pipeline.points import Watcher, unwatched
from pipeline.protocol.clients import LocalHost
from pipeline.runtime.assembly import Assembly
from pipeline.storage.run import Run
from pipeline.worker.sampling_host import load_playing_host


class LocalStream:
    """Decodes shards one after another, with slots refilled across their borders."""

    def __init__(self, assembly: Assembly, run: Run, *, watch: Watcher = unwatched) -> None:
        self._assembly = assembly
        self._run = run
        self._watch = watch
        self._decoder: ShardDecoder | None = None

    def counts(self) -> Counts:
        """Answers, rejected answers and tokens so far."""
        return Counts() if self._decoder is None else self._decoder.counts

    def waits(self) -> list[str]:
        """What this process waits for."""
        return waits()

    def decode(self, shards: Sequence[int]) -> Generator[ShardOutcome, None, None]:
        """Decode and commit; yield each shard's outcome as it comes. Raises HostError."""
        engine = local_engine(self._assembly, watch=self._watch)
        self._decoder = decoder = ShardDecoder(
            engine,
            num_variants=len(self._assembly.variants),
            num_samples=self._assembly.config.decoding.n,
        )
        waiting = list(reversed(shards))
        while waiting or not decoder.is_idle:
            while waiting and decoder.wants_shard:
                index = waiting.pop()
                if (standing := self._run.commit_of(index)) is not None:  # by another driver
                    yield ShardOutcome(index, rows=standing.rows, rejected=standing.rejected, was_committed=True)
                    continue
                decoder.add(index, self._run.plan.read_shard(index))
            for output in decoder.step():
                with waiting_for(f"the commit of shard {output.index}"):
                    record = self._run.commit(
                        output.index,
                        output.records,
                        seconds=output.seconds,
                        host="local",
                        row_ids=output.row_ids,
                        recoveries=output.recoveries,
                    )
                yield ShardOutcome(output.index, rows=record.rows, rejected=record.rejected)


def local_engine(assembly: Assembly, *, watch: Watcher = unwatched) -> Engine:
    """Load every host into this process and connect an engine to them."""
    hosts: dict[str, LocalHost] = {}
    for index, plan in enumerate(assembly.topology.hosts):
        with waiting_for(f"host {plan.name} to load"):
            hosts[plan.name] = LocalHost(load_playing_host(assembly, index, watch), plan)
    config = assembly.config
    is_alone = len(hosts) == 1
    return Engine(
        assembly.topology,
        hosts,
        assembly.prompter,
        config.decoding,
        assembly.variants,
        num_slots=agree_on_slots(config, hosts),
        runs_ahead=is_alone and all(each.host.is_asynchronous for each in hosts.values()),
    )
