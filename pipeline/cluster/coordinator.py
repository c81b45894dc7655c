"""The coordinator: decodes the shards of many callers in one loop, and commits them.

One thread runs the decoder for all callers, so that slots refill across shard borders. When a host fails, all hosts
of the replica are replaced and the running rows begin again, a limited number of times. Ray's own retries are not
used: Ray would repeat a call on a restarted actor with an empty cache, where rows must begin again from their
    prompts.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.cluster.board import ask
from pipeline.cluster.host_groups import HostGroup, HostLaunch
from pipeline.engine.shards import ShardDecoder, ShardOutcome, ShardOutput
from pipeline.errors import CageError, HostError
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.metrics import Load
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.hosts import Hosts
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.engines import make_decoder
from pipeline.storage.run import Run


@dataclass(slots=True)
class _Job:
    """A shard that a caller waits for."""

    index: int
    attempt: int
    done: Future[ShardOutput]


class Coordinator:
    """Runs the decoder over a replica's hosts. `decode_and_commit` may be called from many threads.

    Args:
        assembly: the replica.
        launch: how its hosts are started.
        replica: its number, which selects its placement group.
        hosts: the first hosts, which are loading already, or why they cannot start.
        run_path: the run directory.
        board: where attempts are counted, an actor handle.
        max_attempts: of one shard.
        name: of this process, for the commit records.
    """

    def __init__(
        self,
        assembly: Assembly,
        launch: HostLaunch,
        replica: int,
        hosts: HostGroup | CageError,
        run_path: str,
        board: Any,
        max_attempts: int,
        *,
        name: str,
    ) -> None:
        # games are small, and more threads would take cores from hosts on the same machine
        torch.set_num_threads(1)
        self._launch = launch
        self._replica = replica
        self._hosts: HostGroup | CageError | None = hosts
        self._assembly = assembly
        self._run = Run.open(run_path, open_store=launch.wiring.open_store)
        self._board = board
        self._max_attempts = max_attempts
        self._name = name
        self._incoming: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._counts_before = Counts()  # of decoders before this one
        self._decoder: ShardDecoder | None = None
        threading.Thread(target=self._serve, name="decoder", daemon=True).start()

    @property
    def counts(self) -> Counts:
        """What was done since this process started. May be read from any thread."""
        decoder = self._decoder
        return self._counts_before if decoder is None else self._counts_before + decoder.counts

    @property
    def load(self) -> Load:
        """How full the slots are now. May be read from any thread."""
        decoder = self._decoder
        return Load() if decoder is None else decoder.load

    def decode_and_commit(self, index: int, attempt: int) -> ShardOutcome:
        """Decode a shard and commit it, unless it is committed already; returns when that is done.

        Args:
            index: of the shard.
            attempt: the number of this attempt, as the board counts.

        Raises:
            CageError: its attempts are used up, or no attempt can succeed (a configuration or storage error).
        """
        with waiting_for(f"a look whether shard {index} is committed"):
            standing = self._run.commit_of(index)
        if standing is not None:  # by another driver, or by a replica that died before it could say so
            return ShardOutcome(index, rows=standing.rows, failed=standing.failed, was_committed=True)
        job = _Job(index, attempt, Future())
        self._incoming.put(job)
        output = job.done.result()
        with waiting_for(f"the commit of shard {index}"):
            record = self._run.commit(
                index,
                output.records,
                attempt=job.attempt,
                seconds=output.seconds,
                host=self._name,
                row_ids=output.row_ids,
                recoveries=output.recoveries,
            )
        return ShardOutcome(index, rows=record.rows, failed=record.failed)

    def report_hosts(self) -> None:
        """Have the hosts report what they did up to now."""
        if isinstance(hosts := self._hosts, HostGroup):
            hosts.report()

    def _serve(self) -> None:
        """Decode until the process ends; after a failure that the decoder cannot recover from, make a new one."""
        while True:
            if not self._jobs:
                self._accept(self._incoming.get())
            try:
                self._decode(self._start_hosts())
            except HostError as error:
                self._restart_or_fail(error)
            except CageError as error:
                self._fail_all(error)
            except Exception as error:  # callers wait for a result without limit: every failure must reach them
                self._fail_all(CageError(f"the coordinator failed: {type(error).__name__}: {error}"))
            finally:
                self._stop_hosts()
                self._counts_before, self._decoder = self.counts, None

    def _start_hosts(self) -> Hosts:
        """Wait for the first hosts, or start new ones."""
        first, self._hosts = self._hosts, None
        if isinstance(first, CageError):
            raise first
        self._hosts = first or HostGroup(self._launch, self._replica, self._board)
        return self._hosts.wait()

    def _stop_hosts(self) -> None:
        if isinstance(self._hosts, HostGroup):
            self._hosts.stop()
        self._hosts = None

    def _decode(self, hosts: Hosts) -> None:
        """Run the decoder without end. Raises CageError; `_jobs` then holds the shards that were being decoded."""
        self._decoder = decoder = make_decoder(self._assembly, hosts)
        for job in self._jobs.values():
            decoder.add(job.index, self._run.plan.read_shard(job.index))
        while True:
            while decoder.wants_shard and (arrived := self._next_job(wait=decoder.is_idle)):
                self._accept(arrived)
                decoder.add(arrived.index, self._run.plan.read_shard(arrived.index))
            for output in self._step(decoder):
                self._jobs.pop(output.index).done.set_result(output)

    def _step(self, decoder: ShardDecoder) -> list[ShardOutput]:
        """Run a step of the decoder; if a host fails, the same decoder goes on with new ones."""
        try:
            return decoder.step()
        except HostError as error:
            # first, since the new hosts need the CPUs, GPUs and memory of the old ones
            self._stop_hosts()
            decoder.recover(self._start_hosts(), error)
            return []

    def _accept(self, job: _Job) -> None:
        self._jobs[job.index] = job

    def _next_job(self, *, wait: bool) -> _Job | None:
        try:
            return self._incoming.get(block=wait)
        except queue.Empty:
            return None

    def _restart_or_fail(self, error: HostError) -> None:
        """Count an attempt for every shard that was being decoded; fail those that have no attempt left."""
        for job in list(self._jobs.values()):
            if job.attempt >= self._max_attempts:
                self._jobs.pop(job.index).done.set_exception(error)
            else:
                job.attempt = ask(self._board.begin.remote(job.index))

    def _fail_all(self, error: CageError) -> None:
        for job in list(self._jobs.values()):
            self._jobs.pop(job.index).done.set_exception(error)
