"""The whole replica in one process, without Ray: for notebooks, tests and machines without a cluster."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pipeline.decoding.assembly import Assembly
from pipeline.decoding.engine import Engine
from pipeline.decoding.hosts import LocalHost
from pipeline.decoding.shards import Counts, ShardDecoder, ShardOutcome
from pipeline.models.loading import load_host
from pipeline.points import Watcher, unwatched
from pipeline.storage.run import Run


class LocalStream:
    """Decodes shards one after another, with slots refilled across their borders."""

    def __init__(self, assembly: Assembly, run: Run, *, watch: Watcher = unwatched) -> None:
        self._run = run
        self._decoder = ShardDecoder(
            local_engine(assembly, watch=watch),
            num_variants=len(assembly.variants),
            num_samples=assembly.config.decoding.n,
        )

    def counts(self) -> Counts:
        """Answers, rejected answers and tokens so far."""
        return self._decoder.counts

    def decode(self, shards: Sequence[int]) -> Generator[ShardOutcome, None, None]:
        """Decode and commit; yield each shard's outcome as it comes. Raises HostError."""
        waiting = list(reversed(shards))
        while waiting or not self._decoder.is_idle:
            while waiting and self._decoder.wants_shard:
                index = waiting.pop()
                self._decoder.add(index, self._run.plan.read_shard(index))
            for output in self._decoder.step():
                self._run.commit(
                    output.index, output.records, seconds=output.seconds, host="local", row_ids=output.row_ids
                )
                yield ShardOutcome(output.index)


def local_engine(assembly: Assembly, *, watch: Watcher = unwatched) -> Engine:
    """Load every host into this process and connect an engine to them."""
    hosts = {
        plan.name: LocalHost(load_host(spec), plan, watch)
        for plan, spec in zip(assembly.lineup.hosts, assembly.hosts, strict=True)
    }
    config = assembly.config
    return Engine(
        assembly.lineup,
        hosts,
        assembly.prompter,
        config.decoding,
        assembly.variants,
        num_slots=config.cluster.slots,
    )
