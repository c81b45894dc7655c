"""Hosts as Ray actors: one placement group a replica, one actor a host, answers that name who failed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.serialization import register_serializer

from pipeline.config.sections import ClusterConfig
from pipeline.errors import CageError, ConfigurationError, HostError
from pipeline.monitoring.waits import waiting_for
from pipeline.points import Watcher, unwatched
from pipeline.protocol.clients import HostClient, Pending, Reply, describe_failure
from pipeline.runtime.topology import HostPlan

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


KEPT_ANSWERS = 16  # an engine waits for two at most; what it has no use for any more is not collected


@dataclass(frozen=True, slots=True)
class Ticket:
    """Stands for an answer that a host's device still computes."""

    number: int


class HostActor:
    """Holds one host in its own process and on its own device.

    Where its device goes on by itself, a call ends as soon as it has begun, and its answer is collected by a call of
    its own: behind the next step's, so that the device has work while the answer is on its way.
    """

    def __init__(self, assembly: tuple[Any], index: int, watch: Watcher) -> None:
        self._assembly = assembly
        self._index = index
        self._watch = watch
        self._host: Any = None
        self._answers: dict[int, Pending] = {}
        self._num_tickets = 0

    def load(self) -> None:
        """Load the weights. Not in `__init__`: an error there loses its class on the way."""
        from pipeline.worker.sampling_host import load_playing_host  # heavy, and this process alone needs it

        send_tensors_as_arrays()
        self._host = load_playing_host(ray.get(self._assembly[0]), self._index, self._watch)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run one method of the host; tensors of the answer arrive on the CPU."""
        if self._host is None:
            raise HostError("this process has no weights")
        answer = getattr(self._host, method)(*args, **kwargs)
        if not isinstance(answer, Pending):
            return answer
        ticket = Ticket(self._num_tickets)
        self._num_tickets += 1
        self._answers[ticket.number] = answer
        self._answers.pop(ticket.number - KEPT_ANSWERS, None)
        return ticket

    def collect(self, ticket: Ticket) -> Any:
        """Wait for the answer of a call; once."""
        return self._answers.pop(ticket.number).wait()


class RayHost:
    """A host in an actor. Calls run in the order of submission; one waits for the replies among its arguments."""

    def __init__(self, actor: Any, plan: HostPlan, timeout_s: float) -> None:
        self.actor = actor
        self._plan = plan
        self._timeout_s = timeout_s

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Reply:
        values = [each.reference if isinstance(each, RayReply) else each for each in args]
        return RayReply(
            self.actor, self.actor.call.remote(method, *values, **kwargs), self._plan, method, self._timeout_s
        )


class RayReply:
    """An answer that a host owes. A reply among the arguments of a call must not be one that is collected."""

    def __init__(self, actor: Any, reference: Any, plan: HostPlan, method: str, timeout_s: float) -> None:
        self.reference = reference
        self._actor = actor
        self._plan = plan
        self._method = method
        self._timeout_s = timeout_s

    def result(self) -> Any:
        try:
            with waiting_for(f"an answer of host {self._plan.name} to {self._method}"):
                until_s = time.monotonic() + self._timeout_s
                answer = ray.get(self.reference, timeout=self._timeout_s)
                if isinstance(answer, Ticket):
                    left_s = max(0.0, until_s - time.monotonic())
                    answer = ray.get(self._actor.collect.remote(answer), timeout=left_s)
                return answer
        except RayTaskError as error:
            if isinstance(error.cause, ConfigurationError):
                raise error.cause from None
            raise describe_failure(self._plan, self._method, error.cause) from None
        except GetTimeoutError:
            waited = HostError(f"no answer within {self._timeout_s:g} s")
            raise describe_failure(self._plan, self._method, waited) from None
        except RayError as error:
            raise describe_failure(self._plan, self._method, error) from None


@dataclass(frozen=True, slots=True)
class HostLaunch:
    """What it takes to place the hosts of a replica; light, so that they start before the coordinator's imports.

    `assembly` is a reference to the assembly, in a tuple so that Ray does not replace it by its value. `places` are
    one placement group a replica; they belong to the driver, since Ray keeps a group whose creator can restart.
    `watch` is called at the points of a step.
    """

    assembly: tuple[Any]
    plans: tuple[HostPlan, ...]
    cluster: ClusterConfig
    places: tuple[PlacementGroup, ...]
    has_gpus: bool
    watch: Watcher = unwatched


class HostGroup:
    """The hosts of one replica: started together in its placement group, stopped together.

    Loading goes on while the caller does something else; `wait` ends it.
    """

    def __init__(self, launch: HostLaunch, replica: int) -> None:
        self._launch = launch
        self._place = launch.places[replica]
        bundles = [bundle_of(plan, has_gpus=launch.has_gpus) for plan in launch.plans]
        timeout_s = launch.cluster.start_timeout_s
        with waiting_for(f"a placement of {_sum_text(bundles)} in the cluster"):
            is_placed = self._place.wait(timeout_s)
        if not is_placed:
            raise ConfigurationError(
                f"the cluster did not provide {_sum_text(bundles)} for a replica within {timeout_s:g} s"
            )
        self._actors = [self._start_actor(index, bundle) for index, bundle in enumerate(bundles)]
        self._loads = [
            RayReply(actor, actor.load.remote(), plan, "load", timeout_s)
            for actor, plan in zip(self._actors, launch.plans, strict=True)
        ]

    def wait(self) -> dict[str, HostClient]:
        """Wait until every host has its weights; clients by host name. Stops all if one fails, and raises."""
        try:
            for load in self._loads:
                load.result()
        except CageError:
            self.stop()
            raise
        timeout_s = self._launch.cluster.step_timeout_s
        return {
            plan.name: RayHost(actor, plan, timeout_s)
            for actor, plan in zip(self._actors, self._launch.plans, strict=True)
        }

    def stop(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def _start_actor(self, index: int, bundle: dict[str, float]) -> Any:
        return (
            ray.remote(HostActor)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=index),
            )
            .remote(self._launch.assembly, index, self._launch.watch)
        )


@contextmanager
def placed(plans: Sequence[HostPlan], *, num_replicas: int, has_gpus: bool) -> Iterator[tuple[PlacementGroup, ...]]:
    """A placement group for the hosts of each replica, removed at the end; they may still be waiting for room."""
    bundles = [bundle_of(plan, has_gpus=has_gpus) for plan in plans]
    groups = tuple(placement_group(bundles, strategy="PACK") for _ in range(num_replicas))
    try:
        yield groups
    finally:
        for group in groups:
            remove_placement_group(group)


def bundle_of(plan: HostPlan, *, has_gpus: bool) -> dict[str, float]:
    """What Ray reserves for a host: CPUs, and one GPU where the device is one, unless the configuration says."""
    resources = plan.model.resources
    num_gpus = resources.num_gpus
    if num_gpus is None:
        wants_gpu = plan.model.device.startswith("cuda") or (plan.model.device == "auto" and has_gpus)
        num_gpus = 1.0 if wants_gpu else 0.0
    return {"CPU": resources.num_cpus} | ({"GPU": num_gpus} if num_gpus else {})


def _sum_text(bundles: list[dict[str, float]]) -> str:
    total = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    return " and ".join(f"{amount:g} {kind}" for kind, amount in total.items() if amount)


def send_tensors_as_arrays() -> None:
    """Let this process send tensors as NumPy arrays: torch's own pickling takes ten times as long for small ones."""
    from torch import Tensor

    register_serializer(Tensor, serializer=_to_array, deserializer=_to_tensor)


def _to_array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def _to_tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.tensor(array)  # a copy: what Ray hands out cannot be written to
