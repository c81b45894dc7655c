"""Hosts as Ray actors: one actor per host.

Ray neither restarts these actors nor retries their calls. A restarted actor has lost its cache, and a retried call
would run on it as if nothing had happened. Instead the coordinator starts new hosts and begins the rows again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.serialization import register_serializer

from pipeline.cluster.host_reports import HostReports, measured
from pipeline.cluster.ray_errors import lost_actor
from pipeline.errors import ConfigurationError, HostError, StateLost
from pipeline.monitoring.host_meter import HostMeter
from pipeline.monitoring.metrics import HostReport
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.failures import describe_failure
from pipeline.protocol.hosts import Hosts, Proposes, Reply, Samples, Scores
from pipeline.protocol.messages import Candidates, HostWork, MemoryBudget, Position, Step, Terms, TokenOutcome
from pipeline.protocol.specs import HostSpec, RankPlace
from pipeline.protocol.topology import HostPlan
from pipeline.runtime.wiring import WrapHost

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")

ENDED_S = 1.0  # for Ray to notice that an actor's process has ended
KEPT_OUTCOMES = 16  # an engine waits for two at most; those of steps that it has given up are never collected


@dataclass(frozen=True, slots=True)
class Ticket:
    """Stands for outcomes that a host's device still computes; `HostActor.collect` exchanges it for them.

    Args:
        number: of the ticket; each is given once by an actor.
    """

    number: int


class HostActor:
    """Holds one host in its own process and on its own device.

    Where the host runs ahead, `advance_and_sample` returns a ticket as soon as the device has begun, and a second
    call collects the outcomes. An actor runs its calls in order, so the next step is sent in between: the device then
    has work while the outcomes travel.

    Args:
        specs: a reference to the specs of all hosts, in a tuple so that Ray does not replace it by its value.
        index: which of them this is.
        wrap_host: called with the host; what it returns takes the host's place.
        reports: where the host reports what it does; None: nowhere.
        place: which rank of the host this is, but for the meeting point; None: it has one process.
    """

    def __init__(
        self,
        specs: tuple[Any],
        index: int,
        wrap_host: WrapHost,
        reports: HostReports | None = None,
        place: RankPlace | None = None,
    ) -> None:
        self._place = place
        self._store: Any = None
        self._reports = reports
        self.meter: HostMeter | None = None
        self._process = ""
        self._specs = specs
        self._index = index
        self._wrap_host = wrap_host
        self._scoring: Scores | None = None
        self._proposing: Proposes | None = None
        self._sampling: Samples | None = None
        self._outcomes: dict[int, Reply[list[TokenOutcome]]] = {}
        self._num_tickets = 0

    def open_group(self) -> str:
        """Open the store at which the ranks of the host find each other; where it is. Asked of the first rank."""
        from pipeline.worker.ranks import open_store

        place = _present(self._place)
        address = ray.util.get_node_ip_address()
        self._store, meeting_point = open_store(address, place.size, timeout_s=place.timeout_s)
        return meeting_point

    def load(self, meeting_point: str = "") -> None:
        """Load the weights. Not in `__init__`: Ray would turn an error there into one of its own classes.

        Args:
            meeting_point: of the host's ranks, where it has several.
        """
        spec: HostSpec = ray.get(self._specs[0])[self._index]
        from pipeline.worker.start import (  # heavy, for this process alone
            start_proposing,
            start_rank,
            start_sampling,
            start_scoring,
        )

        send_tensors_as_arrays()
        if self._place is not None:
            place = replace(self._place, meeting_point=meeting_point)
            is_base = self._index == 0
            rank = start_rank(spec, place, is_base=is_base, wrap_host=self._wrap_host, store=self._store)
            self._scoring = self._proposing = self._sampling = rank
            self._begin_to_report(rank)
        elif spec.games is not None:
            self.serve_sampling(start_sampling(spec, spec.games))
        elif self._index == 0:  # the base's
            self.serve_proposing(start_proposing(spec))
        else:
            self.serve_scoring(start_scoring(spec))

    def serve_scoring(self, host: Scores) -> None:
        """Serve calls by this host, which only scores."""
        self._scoring = self._wrap_host(host)
        self._begin_to_report(host)

    def serve_proposing(self, host: Proposes) -> None:
        """Serve calls by this host, which serves the base."""
        self._scoring = self._proposing = self._wrap_host(host)
        self._begin_to_report(host)

    def serve_sampling(self, host: Samples) -> None:
        """Serve calls by this host, which holds every role."""
        self._scoring = self._proposing = self._sampling = self._wrap_host(host)
        self._begin_to_report(host)

    def _begin_to_report(self, host: Scores) -> None:
        if self._reports is not None:
            self.meter = HostMeter(host.work)
            self._process = self._reports.follow(self.meter)

    @measured
    def advance(self, at: Position, step: Step) -> None:
        _present(self._scoring).advance(at, step)

    @measured
    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Candidates | None
    ) -> Tensor:
        return _present(self._scoring).values_at(at, slots, num_tokens, proposal)

    @measured
    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        return _present(self._scoring).score(prompts, answer, weights)

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        return _present(self._scoring).memory_budget(row_tokens)

    @measured
    def resize(self, num_slots: int) -> None:
        _present(self._scoring).resize(num_slots)

    @measured
    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Candidates:
        return _present(self._proposing).advance_and_propose(
            at, step, slots, num_candidates=num_candidates, min_p=min_p
        )

    @measured
    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> list[TokenOutcome] | Ticket:
        """Advance and sample; the outcomes, or a ticket for them."""
        reply = _present(self._sampling).advance_and_sample(at, step, slots, terms, uniforms)
        if reply.is_ready:
            return reply.result()
        ticket = Ticket(self._num_tickets)
        self._num_tickets += 1
        self._outcomes[ticket.number] = reply
        self._outcomes.pop(ticket.number - KEPT_OUTCOMES, None)
        return ticket

    @measured
    def collect(self, ticket: Ticket) -> list[TokenOutcome]:
        """Wait for the outcomes that a ticket stands for. A ticket can be used once."""
        return self._outcomes.pop(ticket.number).result()

    def work(self) -> HostWork:
        return _present(self._sampling).work()

    def report(self) -> tuple[str, HostReport] | None:
        """Its process's name on the board, and what it did up to now; None where it does not report."""
        return None if self.meter is None else (self._process, self.meter.read())


def _present(value: T | None) -> T:
    if value is None:
        raise HostError("this process has no weights")
    return value


class RayHost:
    """The client of a host in an actor: `ScoringClient`, and `ProposingClient` or `SamplingClient` by its host.

    Calls run in the order of submission; one waits for the replies among its arguments. All ranks of a host are sent
    the same calls; the first one's answer is the host's, and one that fails or is late fails the host.

    Args:
        actors: handles of `HostActor`s, one for each rank.
        plan: names the host in messages.
        timeout_s: for one answer; a host that takes longer counts as failed.
    """

    def __init__(self, actors: Sequence[Any], plan: HostPlan, timeout_s: float) -> None:
        self.actor, *self._followers = self._actors = tuple(actors)
        self._plan = plan
        self._timeout_s = timeout_s
        self._is_out_of_step = False

    def load(self, wait: str) -> Reply[None]:
        """Ask the actors to load their weights; `wait` is what is waited for until the reply."""
        # a reference, which Ray resolves before the call runs
        meeting_point = self.actor.open_group.remote() if self._followers else ""
        references = [actor.load.remote(meeting_point) for actor in self._actors]
        return Reply(lambda: self._get("load", references, self._timeout_s, wait=wait)[0], handle=references[0])

    def advance(self, at: Position, step: Step) -> Reply[None]:
        return self._reply("advance", at, step)

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Reply[Candidates] | None
    ) -> Reply[Tensor]:
        # the handle in place of the value: Ray resolves it before the call runs, and nobody waits for it here
        given = None if proposal is None else proposal.handle
        return self._reply("values_at", at, slots, num_tokens, given)

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Reply[Tensor]:
        return self._reply("score", prompts, answer, weights)

    def memory_budgets(self, row_tokens: int) -> Reply[tuple[MemoryBudget, ...]]:
        references = self._ask("memory_budget", row_tokens)
        return Reply(lambda: tuple(self._get("memory_budget", references, self._timeout_s)))

    def resize(self, num_slots: int) -> Reply[None]:
        return self._reply("resize", num_slots)

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Reply[Candidates]:
        return self._reply("advance_and_propose", at, step, slots, num_candidates=num_candidates, min_p=min_p)

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        references = self._ask("advance_and_sample", at, step, slots, terms, uniforms)
        return Reply(lambda: self._collect(references))

    def work(self) -> Reply[HostWork]:
        return self._reply("work")

    @property
    def has_ranks(self) -> bool:
        """Whether it is split over several actors."""
        return bool(self._followers)

    def _collect(self, references: Sequence[Any]) -> list[TokenOutcome]:
        """The outcomes, which may take a second call, within the time of one answer."""
        until_s = time.monotonic() + self._timeout_s
        outcomes = self._get("advance_and_sample", references, self._timeout_s)[0]
        if isinstance(outcomes, Ticket):
            left_s = max(0.0, until_s - time.monotonic())
            outcomes = self._get("advance_and_sample", [self.actor.collect.remote(outcomes)], left_s)[0]
        return list(outcomes)

    def _reply(self, message: str, *arguments: Any, **named: Any) -> Reply[Any]:
        references = self._ask(message, *arguments, **named)
        return Reply(lambda: self._get(message, references, self._timeout_s)[0], handle=references[0])

    def _ask(self, message: str, *arguments: Any, **named: Any) -> list[Any]:
        """Send a message to all ranks."""
        return [getattr(actor, message).remote(*arguments, **named) for actor in self._actors]

    def _get(self, message: str, references: Sequence[Any], timeout_s: float, *, wait: str = "") -> list[Any]:
        """Wait for the answers of all ranks.

        Raises:
            HostError: names the host.
            ConfigurationError: as the host raised it.
        """
        if self._is_out_of_step:
            raise describe_failure(self._plan, message, HostError("a rank failed, and the others are out of step"))
        try:
            with waiting_for(wait or f"an answer of host {self._plan.name} to {message}"):
                # raises at once where one rank has failed: the others may wait for it without end
                return list(ray.get(list(references), timeout=timeout_s))
        except RayTaskError as error:
            if isinstance(error.cause, ConfigurationError):
                raise error.cause from None
            self._is_out_of_step = self.has_ranks and not isinstance(error.cause, StateLost)
            cause = (self._is_out_of_step and _why_ended(references)) or error.cause
            raise describe_failure(self._plan, message, cause) from None
        except GetTimeoutError:
            waited = HostError(f"no answer within {timeout_s:g} s")
            raise describe_failure(self._plan, message, waited) from None
        except RayError as error:
            raise describe_failure(self._plan, message, HostError(lost_actor(error))) from None


def _why_ended(references: Sequence[Any]) -> HostError | None:
    """Which rank's process has ended: that says more than the error of one that waited for it in vain."""
    for rank, reference in enumerate(references):
        ready, _ = ray.wait([reference], timeout=ENDED_S)
        try:
            ray.get(ready)
        except RayTaskError:  # it lives
            continue
        except RayError as error:
            return HostError(f"rank {rank}: {lost_actor(error)}")
    return None


def hosts_of(clients: Sequence[RayHost]) -> Hosts:
    """The hosts of a replica, the base's first; they compute at the same time as the coordinator."""
    base, *others = clients
    if not others:
        # ranks draw no tokens: they wait for those that the first one draws
        return Hosts.lone(base, runs_ahead=not base.has_ranks)
    return Hosts(base, tuple(others), is_concurrent=True)


def send_tensors_as_arrays() -> None:
    """Make this process send tensors as NumPy arrays: torch's own pickling takes ten times as long for small ones."""
    from torch import Tensor

    register_serializer(Tensor, serializer=_to_array, deserializer=_to_tensor)


def _to_array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def _to_tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.tensor(array)  # a copy: arrays from Ray's object store are read-only
