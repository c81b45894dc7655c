"""Hosts in this process: a message runs at once, and its reply has its value or waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.errors import CageError
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.failures import describe_failure
from pipeline.protocol.hosts import (
    Hosts,
    Proposes,
    ProposingClient,
    Reply,
    Samples,
    Scores,
    ScoringClient,
)
from pipeline.protocol.messages import Candidates, HostWork, MemoryBudget, Position, Step, Terms, TokenOutcome
from pipeline.protocol.topology import HostPlan
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.rank_groups import RankGroupHost
from pipeline.runtime.wiring import DIRECT, Wiring
from pipeline.worker.start import start_proposing, start_sampling, start_scoring

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
HostT = TypeVar("HostT", bound=Scores)
ProposingT = TypeVar("ProposingT", bound=Proposes)

# What a host may raise and the coordinator can handle; anything else is a bug and ends the process.
FAILURES = (CageError, RuntimeError, ValueError, IndexError, KeyError, MemoryError)


def start_hosts(assembly: Assembly, *, wiring: Wiring = DIRECT) -> Hosts:
    """Load every host of a replica: into this process, or one process for each rank where its weights are split.

    Args:
        assembly: the replica.
        wiring: wraps the hosts.

    Raises:
        ConfigurationError: a model cannot be served.
    """
    plans, specs, cluster = assembly.topology.hosts, assembly.hosts, assembly.config.cluster
    # groups begin to load at once, each in processes of its own
    groups = {
        spec.name: RankGroupHost(
            spec,
            plan,
            wiring.wrap_host,
            start_timeout_s=cluster.start_timeout_s,
            step_timeout_s=cluster.step_timeout_s,
        )
        for plan, spec in zip(plans, specs, strict=True)
        if spec.tensor_parallel > 1
    }
    (plan, *other_plans), (spec, *other_specs), (load, *other_loads) = plans, specs, assembly.loads
    with _loading(plan, load):
        if spec.games is not None:
            if spec.name in groups:
                return Hosts.lone(groups[spec.name].loaded(load), runs_ahead=False)
            sampler = wiring.wrap_host(start_sampling(spec, spec.games))
            return Hosts.lone(LocalSamplingHost(sampler, plan), runs_ahead=sampler.runs_ahead)
        base: ProposingClient = groups.get(spec.name) or LocalProposingHost(
            wiring.wrap_host(start_proposing(spec)), plan
        )
    others: list[ScoringClient] = []
    for other, other_spec, load in zip(other_plans, other_specs, other_loads, strict=True):
        with _loading(other, load):
            group = groups.get(other_spec.name)
            others.append(group or LocalHost(wiring.wrap_host(start_scoring(other_spec)), other))
    for name, load in zip((each.name for each in specs), assembly.loads, strict=True):
        if name in groups:
            groups[name].loaded(load)
    return Hosts(base, tuple(others), is_concurrent=len(groups) == len(specs))


def start_again(hosts: Hosts, assembly: Assembly) -> bool:
    """Start the ranks of those hosts again that lost one; whether there were any.

    Raises:
        CageError: they cannot be loaded any more.
    """
    lost = [
        (client, load)
        for client, load in zip(hosts.all, assembly.loads, strict=True)
        if isinstance(client, RankGroupHost) and client.is_lost
    ]
    for client, _ in lost:
        client.start()
    for client, load in lost:
        client.loaded(load)
    return bool(lost)


@contextmanager
def _loading(plan: HostPlan, load: str) -> Iterator[None]:
    """Start a host in the block. What a machine cannot do is a HostError that names it, as it is over Ray."""
    with waiting_for(load):
        try:
            yield
        except CageError:
            raise
        except FAILURES as error:
            raise describe_failure(plan, "load", error) from error


class LocalHost(Generic[HostT]):
    """The client of a host in this process (`ScoringClient`).

    Args:
        host: the host.
        plan: names it in messages.
    """

    def __init__(self, host: HostT, plan: HostPlan) -> None:
        self.host = host
        self._plan = plan

    def advance(self, at: Position, step: Step) -> Reply[None]:
        return self._run("advance", lambda: self.host.advance(at, step))

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Reply[Candidates] | None
    ) -> Reply[Tensor]:
        return self._run(
            "values_at",
            lambda: self.host.values_at(at, slots, num_tokens, None if proposal is None else proposal.result()),
        )

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Reply[Tensor]:
        return self._run("score", lambda: self.host.score(prompts, answer, weights))

    def memory_budgets(self, row_tokens: int) -> Reply[tuple[MemoryBudget, ...]]:
        return self._run("memory_budget", lambda: (self.host.memory_budget(row_tokens),))

    def resize(self, num_slots: int) -> Reply[None]:
        return self._run("resize", lambda: self.host.resize(num_slots))

    def _run(self, message: str, function: Callable[[], T]) -> Reply[T]:
        """Run the host at once. What it raises is raised by the reply, as it is by a host in another process."""
        try:
            return Reply.of(self._guarded(message, function))
        except CageError as error:
            return _failed(error)

    def _guarded(self, message: str, function: Callable[[], T]) -> T:
        """Call a function of the host. Raises HostError, which names the host and the message."""
        try:
            with waiting_for(f"an answer of host {self._plan.name} to {message}"):
                return function()
        except FAILURES as error:
            raise describe_failure(self._plan, message, error) from error


class LocalProposingHost(LocalHost[ProposingT]):
    """The client of a host in this process that proposes (`ProposingClient`)."""

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Reply[Candidates]:
        return self._run(
            "advance_and_propose",
            lambda: self.host.advance_and_propose(at, step, slots, num_candidates=num_candidates, min_p=min_p),
        )


class LocalSamplingHost(LocalProposingHost[Samples]):
    """The client of a host in this process that samples (`SamplingClient`)."""

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        message = "advance_and_sample"
        try:
            pending = self._guarded(message, lambda: self.host.advance_and_sample(at, step, slots, terms, uniforms))
        except CageError as error:
            return _failed(error)
        if pending.is_ready:
            return pending
        return Reply(lambda: self._guarded(message, pending.result))

    def work(self) -> Reply[HostWork]:
        return self._run("work", self.host.work)


def _failed(error: CageError) -> Reply[Any]:
    """A reply that raises."""

    def wait() -> Any:
        raise error

    return Reply(wait)
