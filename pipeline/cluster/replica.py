"""A replica: one coordinator with its hosts, fed with shards by Ray Data, writing and committing what it decodes.

Ray Data calls `Replica` from several threads, a shard each; one thread runs the decoder for all of them, so that
slots refill across shard borders. A failed host is replaced together with its replica's other hosts, and the shards
under way start again, a bounded number of times.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
import torch

from pipeline.cluster.host_actors import HostGroup
from pipeline.decoding.assembly import Assembly
from pipeline.decoding.engine import Engine
from pipeline.decoding.shards import ShardDecoder, ShardOutput
from pipeline.errors import CageError, HostError
from pipeline.storage.run import Run

REPORT_S = 1.0
MIN_SLOTS_FOR_GROUPS = 8  # below, half a batch costs a host nearly as much as a whole one


@dataclass(slots=True)
class _Job:
    """A shard that a caller waits for."""

    index: int
    done: Future[ShardOutput]
    attempts: int = 0


class Replica:
    """The coordinator, as Ray Data's actor pool runs it.

    Args:
        assembly: hosts and roles.
        run_path: the run directory; its plan says what a shard is.
        has_gpus: whether the cluster has GPUs.
        board: where to report progress, an actor handle.
    """

    def __init__(self, assembly: Assembly, run_path: str, has_gpus: bool, board: Any) -> None:
        torch.set_num_threads(1)
        self._assembly = assembly
        self._run = Run.open(run_path)
        self._has_gpus = has_gpus
        self._board = board
        self._name = f"{ray.get_runtime_context().get_node_id()[:8]}-{os.getpid()}"
        self._prompter = assembly.prompter
        self._incoming: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        threading.Thread(target=self._serve, name="decoder", daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Decode and commit the shards of a batch; what came of each, never an exception."""
        outcomes = [self._decode_and_commit(int(index)) for index in batch["shard"]]
        return {key: [outcome[key] for outcome in outcomes] for key in outcomes[0]}

    def _decode_and_commit(self, index: int) -> dict[str, Any]:
        job = _Job(index, Future())
        self._incoming.put(job)
        try:
            output = job.done.result()
            self._run.commit(index, output.records, attempt=job.attempts + 1, seconds=output.seconds, host=self._name)
        except CageError as error:
            return {"shard": index, "error": str(error), "kind": type(error).__name__}
        return {"shard": index, "error": "", "kind": ""}

    def _serve(self) -> None:
        """Start hosts and decode until the process ends; replace the hosts when one fails."""
        while True:
            self._incoming_ready()
            try:
                hosts = HostGroup(self._assembly, has_gpus=self._has_gpus)
            except CageError as error:
                self._fail_all(error)
                continue
            try:
                self._decode(self._decoder(hosts))
            except HostError as error:
                self._restart_or_fail(error)
            except Exception as error:  # the decoder's thread must answer its callers whatever happens
                self._fail_all(CageError(f"the coordinator failed: {type(error).__name__}: {error}"))
            finally:
                hosts.stop()

    def _incoming_ready(self) -> None:
        """Wait until there is something to decode."""
        if not self._jobs:
            job = self._incoming.get()
            self._jobs[job.index] = job

    def _decoder(self, hosts: HostGroup) -> ShardDecoder:
        config = self._assembly.config
        has_overlap = len(self._assembly.hosts) > 1 and config.cluster.slots >= MIN_SLOTS_FOR_GROUPS
        engine = Engine(
            self._assembly.lineup,
            hosts.clients,
            self._prompter,
            config.decoding,
            num_slots=config.cluster.slots,
            num_groups=2 if has_overlap else 1,
        )
        return ShardDecoder(engine, num_samples=config.decoding.n)

    def _decode(self, decoder: ShardDecoder) -> None:
        """The decoder's loop. Raises HostError with `_jobs` holding what was under way."""
        for job in self._jobs.values():
            decoder.add(job.index, self._run.plan.read_shard(job.index))
        reported_s = time.monotonic()
        while True:
            while decoder.wants_shard and (arrived := self._next_job(wait=decoder.is_idle)):
                self._jobs[arrived.index] = arrived
                decoder.add(arrived.index, self._run.plan.read_shard(arrived.index))
            for output in decoder.step():
                self._jobs.pop(output.index).done.set_result(output)
            if time.monotonic() - reported_s > REPORT_S or decoder.is_idle:
                reported_s = time.monotonic()
                self._report(decoder)

    def _next_job(self, *, wait: bool) -> _Job | None:
        try:
            return self._incoming.get(block=wait)
        except queue.Empty:
            return None

    def _report(self, decoder: ShardDecoder) -> None:
        self._board.report.remote(self._name, decoder.counts)

    def _restart_or_fail(self, error: HostError) -> None:
        """Count an attempt for every shard under way; give up those that had enough."""
        for job in list(self._jobs.values()):
            job.attempts += 1
            if job.attempts >= self._assembly.config.errors.max_attempts:
                self._jobs.pop(job.index).done.set_exception(error)

    def _fail_all(self, error: CageError) -> None:
        for job in list(self._jobs.values()):
            self._jobs.pop(job.index).done.set_exception(error)
