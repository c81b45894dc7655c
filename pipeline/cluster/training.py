"""Trainings on the machines of a Ray cluster: one actor for each adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from pipeline.cluster.session import joined
from pipeline.config.sections import ClusterConfig
from pipeline.errors import CageError, ConfigurationError
from pipeline.training.settings import TrainConfig

if TYPE_CHECKING:
    from pipeline.training.fit import Task  # imports TRL: seconds

LOOK_S = 2.0
MAX_ATTEMPTS = 3


class Fitter:
    """Trains one adapter in an actor.

    A training goes on from its newest checkpoint, so Ray may restart the actor and retry the call. The folder has to
    be the same on all machines.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []

    def fit(self, task: Task) -> dict[str, Any] | CageError:
        """Train; what is stated beside the adapter, or the error that kept it from that."""
        from pipeline.training.fit import fit

        try:
            return fit(task, self._lines.append)
        except CageError as error:  # Ray would make one of its own classes of it
            return error

    def take_lines(self) -> list[str]:
        """What was said since the last call."""
        lines, self._lines[:] = list(self._lines), []
        return lines


def fit_all(
    tasks: Sequence[Task], config: TrainConfig, say: Callable[[str], None], *, is_verbose: bool
) -> list[dict[str, Any]]:
    """Train all adapters at the same time, as far as the cluster has resources; the others wait.

    Args:
        tasks: one for each adapter.
        config: names the cluster and what one training reserves.
        say: prints a line.
        is_verbose: whether Ray's own output is shown.

    Raises:
        ConfigurationError: no machine of the cluster has what one training reserves.
        CageError: a training failed, or its actor died more often than is tried; what is finished stays.
    """
    asked = config.base.resources
    cluster = ClusterConfig(address=config.cluster.address)
    with joined(cluster, num_cpus=len(tasks) * asked.num_cpus, is_verbose=is_verbose):
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0 and config.base.device != "cpu"
        num_gpus = (1 if asked.num_gpus is None else asked.num_gpus) if has_gpus else 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if reason := why_no_machine(nodes, num_cpus=asked.num_cpus, num_gpus=num_gpus):
            raise ConfigurationError(reason)
        actor_class = ray.remote(Fitter).options(
            num_cpus=asked.num_cpus,
            num_gpus=num_gpus,
            max_concurrency=2,  # a training, and who asks how it goes
            max_restarts=MAX_ATTEMPTS,
            max_task_retries=MAX_ATTEMPTS,
        )
        actors = [actor_class.remote() for _ in tasks]
        try:
            return _collect(actors, [actor.fit.remote(task) for actor, task in zip(actors, tasks, strict=True)], say)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[-600:]
            raise CageError(f"the trainings' actors failed; what is finished stays: {reason}") from error
        finally:
            for actor in actors:
                ray.kill(actor)


def why_no_machine(nodes: Sequence[Mapping[str, float]], *, num_cpus: float, num_gpus: float) -> str | None:
    """Why no machine has what one training reserves, for which Ray would wait without end; None where one has it.

    Args:
        nodes: what each machine has, by Ray's names.
        num_cpus, num_gpus: of one training.
    """
    if any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes):
        return None
    for key, name, count in (("num_cpus", "CPU", num_cpus), ("num_gpus", "GPU", num_gpus)):
        most = max((node.get(name, 0) for node in nodes), default=0)
        if most < count:
            return f"base.resources.{key} is {count:g}, and no machine of the cluster has more than {most:g} {name}s"
    return f"base.resources: no machine of the cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs together"


def _collect(actors: Sequence[Any], calls: Sequence[Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Wait for all trainings and pass on what they say; the first error ends it when the others have ended."""
    waiting = list(calls)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
        running = [actor for actor, call in zip(actors, calls, strict=True) if call in waiting]
        for actor in running or actors:
            ready, _ = ray.wait([lines := actor.take_lines.remote()], timeout=LOOK_S)
            for line in ray.get(lines) if ready else ():
                say(line)
    results = ray.get(list(calls))
    for result in results:
        if isinstance(result, CageError):
            raise result
    return list(results)
