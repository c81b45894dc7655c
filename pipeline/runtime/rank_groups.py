"""Tensor parallel hosts without Ray: a process for each rank, started and ended together.

Messages go to all ranks, and the first one's answer is the host's. A rank that ends, fails or does not answer in time
ends its whole group, which can be started again.
"""

from __future__ import annotations

import math
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.errors import CageError, ConfigurationError, HostError, StateLost
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.failures import describe_failure
from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import Candidates, HostWork, MemoryBudget, Position, Step, Terms, TokenOutcome
from pipeline.protocol.specs import HostSpec, RankPlace
from pipeline.protocol.topology import BASE, HostPlan
from pipeline.runtime.wiring import WrapHost
from pipeline.worker.rank_messages import Answer, Message, Start, receive, send

if TYPE_CHECKING:
    from torch import Tensor

END_S = 5.0  # for a process that was killed
NOTICED_S = 1.0  # within which the end of a process shows here, too


class RankGroupHost:
    """The client of a host whose ranks are processes of this machine: `ScoringClient`, `ProposingClient` or
    `SamplingClient` by its host.

    Creating it starts the processes and returns while they load; `loaded` waits for them.

    Args:
        spec: of the host.
        plan: names it in messages.
        wrap_host: wraps the host of each rank.
        start_timeout_s: for loading.
        step_timeout_s: for one answer; a host that takes longer counts as failed.
    """

    def __init__(
        self, spec: HostSpec, plan: HostPlan, wrap_host: WrapHost, *, start_timeout_s: float, step_timeout_s: float
    ) -> None:
        self.spec = spec
        self._plan = plan
        self._wrap_host = wrap_host
        self._start_timeout_s = start_timeout_s
        self._step_timeout_s = step_timeout_s
        self.start()

    def start(self) -> None:
        """Start the ranks, in place of those that there were."""
        self._why_lost: str | None = None
        self._ranks = _Ranks(self.spec, self._wrap_host, timeout_s=max(self._start_timeout_s, self._step_timeout_s))

    def load(self, spec: HostSpec, plan: HostPlan) -> None:
        """Have the ranks load another host in place of theirs; `loaded` waits for it."""
        self.spec, self._plan = spec, plan
        if self.is_lost:
            self.start()
        else:
            self._ranks.load(spec, self._wrap_host)

    def loaded(self, what: str) -> RankGroupHost:
        """Wait until every rank has loaded its part of the weights; the host itself.

        Args:
            what: is waited for, for reports.

        Raises:
            CageError: one of them failed; all are ended.
        """
        with waiting_for(what):
            for text in self._collect("load", self._ranks.loading, self._start_timeout_s).warnings:
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        return self

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The process of each rank."""
        return [rank.process for rank in self._ranks.ranks]

    @property
    def is_lost(self) -> bool:
        """Whether its ranks were ended because one of them failed."""
        return self._why_lost is not None

    def advance(self, at: Position, step: Step) -> Reply[None]:
        return self._send("advance", at, step)

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Reply[Candidates] | None
    ) -> Reply[Tensor]:
        return self._send("values_at", at, slots, num_tokens, None if proposal is None else proposal.result())

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Reply[Tensor]:
        return self._send("score", prompts, answer, weights)

    def memory_budgets(self, row_tokens: int) -> Reply[tuple[MemoryBudget, ...]]:
        answers = self._ask("memory_budget", row_tokens)
        return Reply(lambda: tuple(each.value for each in self._collect_all("memory_budget", answers)))

    def resize(self, num_slots: int) -> Reply[None]:
        return self._send("resize", num_slots)

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Reply[Candidates]:
        return self._send("advance_and_propose", at, step, slots, num_candidates=num_candidates, min_p=min_p)

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        return self._send("advance_and_sample", at, step, slots, terms, uniforms)

    def work(self) -> Reply[HostWork]:
        return self._send("work")

    def ask(self, method: str) -> Any:
        """What a method of the first rank's host returns, one that a wrapper has added."""
        return self._send(method).result()

    def close(self) -> None:
        """End the ranks."""
        self._lose("it was closed")

    def _send(self, method: str, *arguments: Any, **named: Any) -> Reply[Any]:
        answers = self._ask(method, *arguments, **named)
        return Reply(lambda: self._collect(method, answers, self._step_timeout_s).value)

    def _ask(self, method: str, *arguments: Any, **named: Any) -> list[Future[Answer]]:
        return self._ranks.ask(Message(method, arguments, named))

    def _collect(self, method: str, answers: Sequence[Future[Answer]], timeout_s: float) -> Answer:
        """The first rank's answer, when all ranks have answered."""
        return self._collect_all(method, answers, timeout_s)[0]

    def _collect_all(
        self, method: str, answers: Sequence[Future[Answer]], timeout_s: float | None = None
    ) -> list[Answer]:
        """The answers of all ranks.

        Raises:
            StateLost: all ranks say so; they go on.
            CageError: a rank failed or did not answer in time; all are ended.
        """
        if self._why_lost is not None:
            raise describe_failure(self._plan, method, HostError(f"its ranks were ended: {self._why_lost}"))
        timeout_s = timeout_s or self._step_timeout_s
        with waiting_for(f"an answer of host {self._plan.name} to {method}"):
            found = _wait_for(answers, timeout_s)
        if isinstance(found, list):
            return found
        if not isinstance(found, StateLost):
            # a rank that another one waits for in vain says less than the end of that one
            found = self._ranks.why_ended() or found
            self._lose(" ".join(str(found).split()))
        if isinstance(found, ConfigurationError):
            raise found
        raise describe_failure(self._plan, method, found)

    def _lose(self, why: str) -> None:
        self._why_lost = why
        self._ranks.end()


def _wait_for(answers: Sequence[Future[Answer]], timeout_s: float) -> list[Answer] | CageError:
    """All answers, or why they are not there: the first failure; StateLost only where every rank says so."""
    until_s = time.monotonic() + timeout_s
    waiting = set(answers)
    lost: StateLost | None = None
    while waiting:
        done, waiting = wait(waiting, max(0.0, until_s - time.monotonic()), FIRST_EXCEPTION)
        if not done:
            late = ", ".join(str(rank) for rank, answer in enumerate(answers) if answer in waiting)
            return HostError(f"no answer of rank {late} within {timeout_s:g} s")
        for answer in done:
            error = answer.exception()
            if isinstance(error, StateLost):
                lost = error
            elif error is not None:
                assert isinstance(error, CageError)
                return error
    return lost if lost is not None else [answer.result() for answer in answers]


class _Ranks:
    """The processes of one group.

    Args:
        spec: of their host.
        wrap_host: wraps the host of each.
        timeout_s: how long they wait for each other.

    Attributes:
        ranks: the processes, the first rank's first.
        loading: the answer of each to being told what to load.
    """

    def __init__(self, spec: HostSpec, wrap_host: WrapHost, *, timeout_s: float) -> None:
        size = spec.tensor_parallel
        folder = TemporaryDirectory(prefix="cage-ranks-")
        meeting_point = str(Path(folder.name) / "ranks")
        first_gpu = int(spec.device.partition(":")[2] or 0)
        self.ranks = [_Rank(rank, timeout_s) for rank in range(size)]
        self._end = weakref.finalize(self, _end, self.ranks, folder)
        self._places = [
            RankPlace(rank.number, size, meeting_point, True, timeout_s, first_gpu + rank.number)
            for rank in self.ranks
        ]
        self.load(spec, wrap_host)

    def load(self, spec: HostSpec, wrap_host: WrapHost) -> None:
        """Have all ranks load a host."""
        self.loading = [
            rank.ask(Start(spec, place, BASE in spec.serves, wrap_host))
            for rank, place in zip(self.ranks, self._places, strict=True)
        ]

    def ask(self, message: Message) -> list[Future[Answer]]:
        """Send a message to all ranks; the answer of each is still to come."""
        return [rank.ask(message) for rank in self.ranks]

    def why_ended(self) -> HostError | None:
        """Which process has ended by itself; None where all run.

        The other ranks may notice that before this process does, which waits for it a little.
        """
        until_s = time.monotonic() + NOTICED_S
        while not (ended := [rank for rank in self.ranks if rank.process.poll() is not None]):
            if time.monotonic() >= until_s:
                return None
            time.sleep(0.01)
        return ended[0].why_ended()

    def end(self) -> None:
        """End all processes."""
        self._end()


class _Rank:
    """One process. Answers come in the order of messages, and a thread receives them.

    Args:
        number: of the rank.
        timeout_s: for sending a message.
    """

    def __init__(self, number: int, timeout_s: float) -> None:
        self.number = number
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.worker.rank_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its ranks
            )
        # of a rank that is stopped the buffer fills up: sending ends then, too
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(timeout_s), 0))
        self.connection = Connection(ours.detach())
        self._waiting: deque[Future[Answer]] = deque()
        self._lock = threading.Lock()
        self._is_dead = False
        send(self.connection, sys.path)
        threading.Thread(target=self._receive, daemon=True).start()

    def ask(self, message: Message | Start) -> Future[Answer]:
        """Send a message; its answer, or the error that it ended with."""
        answer: Future[Answer] = Future()
        with self._lock:
            self._waiting.append(answer)
            try:
                if not self._is_dead:
                    send(self.connection, message)
            except OSError:
                self._is_dead = True
            if self._is_dead:
                self._fail()
        return answer

    def _receive(self) -> None:
        """Give each answer to the oldest message, until the process ends."""
        while True:
            try:
                answer: Answer = receive(self.connection)
            except (EOFError, OSError):
                break
            if not self._waiting:  # all were failed: a message could not be sent
                break
            if answer.error is not None:
                self._waiting.popleft().set_exception(answer.error)
            else:
                self._waiting.popleft().set_result(answer)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        with self._lock:
            self._is_dead = True
            self._fail()

    def _fail(self) -> None:
        """Fail all messages without an answer."""
        while self._waiting:
            self._waiting.popleft().set_exception(self.why_ended())

    def why_ended(self) -> HostError:
        """That its process has ended, and how."""
        code = self.process.poll()
        how = "" if code is None else f" (exit code {code})" if code >= 0 else f" (signal {-code})"
        return HostError(f"the process of rank {self.number} ended{how}")


def _end(ranks: Sequence[_Rank], folder: TemporaryDirectory[str]) -> None:
    """Kill the processes and wait for them: they hold nothing that is needed."""
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(END_S)
    folder.cleanup()
