"""How the engine talks to hosts: ask, go on, collect the answer later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import CageError, HostError, HostOutOfMemory, StateLost
from pipeline.monitoring.waits import waiting_for
from pipeline.runtime.topology import HostPlan

if TYPE_CHECKING:
    from pipeline.worker.sampling_host import SamplingHost


class Reply(Protocol):
    """An answer on its way."""

    def result(self) -> Any:
        """Wait for the answer. Raises HostError, which names the host and the principals it serves."""
        ...


class Pending(ABC):
    """What a method of a host may return while its device still computes the answer."""

    @abstractmethod
    def wait(self) -> Any:
        """The answer; waits for the device."""


class HostClient(Protocol):
    """A host, wherever it runs. Calls of one client are executed in the order in which they are submitted.

    A reply among the arguments, of whatever host, stands for its answer: it need not be there yet.
    """

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Reply: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is already there."""

    value: Any = None
    error: HostError | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


@dataclass(slots=True)
class PendingAnswer:
    """An answer that a device of this process still computes."""

    pending: Pending
    host: LocalHost
    method: str

    def result(self) -> Any:
        return self.host.run(self.method, self.pending.wait)


class LocalHost:
    """A host in this process: a call runs at once."""

    def __init__(self, host: SamplingHost, plan: HostPlan) -> None:
        self.host = host
        self._plan = plan

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Reply:
        try:
            values = [each.result() if isinstance(each, Answer | PendingAnswer) else each for each in args]
            answer = self.run(method, getattr(self.host, method), *values, **kwargs)
        except HostError as error:
            return Answer(error=error)
        return PendingAnswer(answer, self, method) if isinstance(answer, Pending) else Answer(answer)

    def run(self, method: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the host. Raises HostError, which names the host and the method."""
        try:
            with waiting_for(f"an answer of host {self._plan.name} to {method}"):
                return function(*args, **kwargs)
        except (CageError, RuntimeError, ValueError, IndexError, KeyError, MemoryError) as error:
            raise describe_failure(self._plan, method, error) from error


def describe_failure(plan: HostPlan, method: str, error: BaseException) -> HostError:
    """A one-line HostError that names the host, its model and the principals that it serves; of the error's class
    where that says what to do."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
    kept = next((each for each in (StateLost, HostOutOfMemory) if isinstance(error, each)), HostError)
    failure = kept(
        f"host {plan.name} ({plan.model.model}, serving {', '.join(plan.serves)}) failed in {method}: {what}"
    )
    failure.__cause__ = error
    return failure


Hosts = Mapping[str, HostClient]
