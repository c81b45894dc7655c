"""Hosts as Ray actors: one actor per host.

Ray neither restarts these actors nor retries their calls. A restarted actor has lost its cache, and a retried call
would run on it as if nothing had happened. Instead the coordinator starts new hosts and begins the rows again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.serialization import register_serializer

from pipeline.cluster.host_reports import HostReports, measured
from pipeline.cluster.ray_errors import lost_actor
from pipeline.errors import ConfigurationError, HostError
from pipeline.monitoring.host_meter import HostMeter
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.failures import describe_failure
from pipeline.protocol.hosts import Hosts, Proposes, Reply, Samples, Scores
from pipeline.protocol.messages import Candidates, HostWork, MemoryBudget, Position, Step, Terms, TokenOutcome
from pipeline.protocol.specs import HostSpec
from pipeline.protocol.topology import HostPlan
from pipeline.runtime.wiring import WrapHost

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")

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
    """

    def __init__(
        self, specs: tuple[Any], index: int, wrap_host: WrapHost, reports: HostReports | None = None
    ) -> None:
        self._reports = reports
        self.meter: HostMeter | None = None
        self._specs = specs
        self._index = index
        self._wrap_host = wrap_host
        self._scoring: Scores | None = None
        self._proposing: Proposes | None = None
        self._sampling: Samples | None = None
        self._outcomes: dict[int, Reply[list[TokenOutcome]]] = {}
        self._num_tickets = 0

    def load(self) -> None:
        """Load the weights. Not in `__init__`: Ray would turn an error there into one of its own classes."""
        from pipeline.worker.start import (  # heavy, for this process alone
            start_proposing,
            start_sampling,
            start_scoring,
        )

        send_tensors_as_arrays()
        spec: HostSpec = ray.get(self._specs[0])[self._index]
        if spec.games is not None:
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
            self._reports.follow(self.meter)

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


def _present(host: T | None) -> T:
    if host is None:
        raise HostError("this process has no weights")
    return host


class RayHost:
    """The client of a host in an actor: `ScoringClient`, and `ProposingClient` or `SamplingClient` by its host.

    Calls run in the order of submission; one waits for the replies among its arguments.

    Args:
        actor: handle of a `HostActor`.
        plan: names the host in messages.
        timeout_s: for one answer; a host that takes longer counts as failed.
    """

    def __init__(self, actor: Any, plan: HostPlan, timeout_s: float) -> None:
        self.actor = actor
        self._plan = plan
        self._timeout_s = timeout_s

    def load(self, wait: str) -> Reply[None]:
        """Ask the actor to load its weights; `wait` is what is waited for until the reply."""
        reference = self.actor.load.remote()
        return Reply(lambda: self._get("load", reference, self._timeout_s, wait=wait), handle=reference)

    def advance(self, at: Position, step: Step) -> Reply[None]:
        return self._reply("advance", self.actor.advance.remote(at, step))

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Reply[Candidates] | None
    ) -> Reply[Tensor]:
        # the handle in place of the value: Ray resolves it before the call runs, and nobody waits for it here
        given = None if proposal is None else proposal.handle
        return self._reply("values_at", self.actor.values_at.remote(at, slots, num_tokens, given))

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Reply[Tensor]:
        return self._reply("score", self.actor.score.remote(prompts, answer, weights))

    def memory_budget(self, row_tokens: int) -> Reply[MemoryBudget]:
        return self._reply("memory_budget", self.actor.memory_budget.remote(row_tokens))

    def resize(self, num_slots: int) -> Reply[None]:
        return self._reply("resize", self.actor.resize.remote(num_slots))

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Reply[Candidates]:
        return self._reply(
            "advance_and_propose",
            self.actor.advance_and_propose.remote(at, step, slots, num_candidates=num_candidates, min_p=min_p),
        )

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        reference = self.actor.advance_and_sample.remote(at, step, slots, terms, uniforms)
        return Reply(lambda: self._collect(reference))

    def work(self) -> Reply[HostWork]:
        return self._reply("work", self.actor.work.remote())

    def _collect(self, reference: Any) -> list[TokenOutcome]:
        """The outcomes, which may take a second call, within the time of one answer."""
        until_s = time.monotonic() + self._timeout_s
        outcomes = self._get("advance_and_sample", reference, self._timeout_s)
        if isinstance(outcomes, Ticket):
            left_s = max(0.0, until_s - time.monotonic())
            outcomes = self._get("advance_and_sample", self.actor.collect.remote(outcomes), left_s)
        return list(outcomes)

    def _reply(self, message: str, reference: Any) -> Reply[Any]:
        return Reply(lambda: self._get(message, reference, self._timeout_s), handle=reference)

    def _get(self, message: str, reference: Any, timeout_s: float, *, wait: str = "") -> Any:
        """Wait for an answer. Raises HostError, which names the host, or ConfigurationError as the host raised it."""
        try:
            with waiting_for(wait or f"an answer of host {self._plan.name} to {message}"):
                return ray.get(reference, timeout=timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, ConfigurationError):
                raise error.cause from None
            raise describe_failure(self._plan, message, error.cause) from None
        except GetTimeoutError:
            waited = HostError(f"no answer within {self._timeout_s:g} s")
            raise describe_failure(self._plan, message, waited) from None
        except RayError as error:
            raise describe_failure(self._plan, message, HostError(lost_actor(error))) from None


def hosts_of(clients: Sequence[RayHost]) -> Hosts:
    """The hosts of a replica, the base's first; they compute at the same time as the coordinator."""
    base, *others = clients
    if not others:
        return Hosts.lone(base, runs_ahead=True)
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
