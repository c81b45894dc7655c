"""A model of Ray: actors, references and placement groups.

Production code of `pipeline.cluster` gets this in place of the module `ray`. The model keeps what that code relies
on: calls of an actor run in the order of submission, an argument that is a reference is waited for, an actor dies
with its owner, errors come as Ray's own classes. `pool` has Ray Data's actor pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

import ray.exceptions
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from simulation.threads import Current, Event, Waiters
from simulation.world import Process

CALL_S = 0.002
START_S = 0.5


class Ref:
    """A reference to a value that is still to come (`ObjectRef`)."""

    def __init__(self, *, is_put: bool = False) -> None:
        self.is_done = False
        self.is_put = is_put
        self.value: Any = None
        self.error: BaseException | None = None
        self._waiters = Waiters()

    def set(self, value: Any = None, error: BaseException | None = None) -> None:
        if not self.is_done:
            self.is_done, self.value, self.error = True, value, error
            self._waiters.wake()

    def wait(self, timeout_s: float | None) -> Any:
        if not self._waiters.wait(lambda: self.is_done, timeout_s):
            raise GetTimeoutError(f"no answer within {timeout_s} s")
        if self.error is not None:
            raise self.error
        return self.value


class Call:
    """A call of an actor."""

    def __init__(self, method: str, args: Sequence[Any], options: dict[str, Any], caller: Process) -> None:
        self.method, self.args, self.options, self.caller = method, args, options, caller
        self.ref = Ref()


class Actor:
    """An actor: a process that runs its calls one after another, in the order of submission.

    Args:
        kind: its class.
        args: of its constructor, and `options` by name.
        owner: dies with it.
        machine: where it runs.
    """

    def __init__(
        self,
        kind: Any,
        args: Sequence[Any],
        owner: Process,
        machine: str,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        world = Current.world
        world.num_actors += 1
        self.process = Process(world, f"{owner.name}.{kind.__name__.lower()}{world.num_actors}", machine, owner)
        self.process.at_death.append(self._died)
        self._kind, self._args, self._options = kind, args, options
        self._calls: deque[Call] = deque()
        self._arrived = Waiters()
        self._underway: list[Call] = []
        self._last_s = 0.0
        self.init_error: BaseException | None = None
        self.is_ready = Event()
        self.instance: Any = None
        self.process.start(self._serve)

    def submit(self, call: Call) -> Ref:
        """Send a call; it arrives a little later, behind those that were sent before."""
        world = Current.world
        if not self.process.is_alive:
            world.after(CALL_S, lambda: call.ref.set(error=RayActorError()))
            return call.ref
        fault = Current.inject.message(call.method)
        kind, size = (fault.kind, fault.size) if fault else ("", 0.0)
        self._underway.append(call)
        if kind == "call lost":
            return call.ref
        delay_s = CALL_S * (0.5 + world.unit(f"{self.process.name} call {world.num_events} {len(self._underway)}"))
        delay_s += size if kind == "call delayed" else 0.0
        arrives_s = max(world.now_s + delay_s, self._last_s + 1e-6)
        if kind == "calls swapped":  # those that are sent within some milliseconds overtake it
            arrives_s += 0.03
        else:
            self._last_s = arrives_s
        if kind == "reply lost":
            call.ref, given = Ref(), call.ref
            world.after(arrives_s - world.now_s, lambda: self._arrive(call))
            return given
        world.after(arrives_s - world.now_s, lambda: self._arrive(call))
        if kind in ("call repeated", "step repeated"):
            again = Call(call.method, call.args, call.options, call.caller)
            world.after(arrives_s - world.now_s + size + 1e-6, lambda: self._arrive(again))
        return call.ref

    def _arrive(self, call: Call) -> None:
        self._calls.append(call)
        self._arrived.wake()

    def _serve(self) -> None:
        world = Current.world
        world.pause(START_S)
        try:
            self.instance = self._kind(*self._args, **self._options)
        except Exception as error:
            self.init_error = error
            self.process.kill(is_end=True)
            return
        self.is_ready.set()
        while True:
            self._arrived.wait(lambda: bool(self._calls), None)
            call = self._calls.popleft()
            try:
                args = [each.wait(None) if isinstance(each, Ref) else each for each in call.args]
                value = getattr(self.instance, call.method)(*args, **call.options)
            except ray.exceptions.RayError as error:  # of an argument
                self._answer(call, error=error)
            except Exception as error:
                self._answer(call, error=RayTaskError(call.method, str(error), error))
            else:
                self._answer(call, value)

    def _answer(self, call: Call, value: Any = None, error: BaseException | None = None) -> None:
        world = Current.world
        world.after(CALL_S, lambda: call.ref.set(value, error))
        if call in self._underway:
            self._underway.remove(call)

    def _died(self) -> None:
        for call in self._underway:
            Current.world.after(0.1, lambda call=call: call.ref.set(error=RayActorError()))


class Handle:
    """A handle of an actor: `handle.method.remote(...)`."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        return _Method(self._actor, method)


class _Method:
    def __init__(self, actor: Actor, method: str) -> None:
        self._actor, self._method = actor, method

    def remote(self, *args: Any, **options: Any) -> Ref:
        process = Current.task().process
        if not process.is_alive:
            Current.world.block()
        return self._actor.submit(Call(self._method, args, options, process))


class RemoteClass:
    """`ray.remote(kind)`."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def options(self, **options: Any) -> RemoteClass:
        return self

    def remote(self, *args: Any, **options: Any) -> Handle:
        process = Current.task().process
        if not process.is_alive:
            Current.world.block()
        return Handle(Actor(self._kind, args, process, process.machine, options))


class PlacementGroup:
    """Resources of one machine, which are there after a moment."""

    def __init__(self, bundles: Any, strategy: str) -> None:
        self.owner = Current.task().process
        self.bundle_specs = list(bundles)

    def wait(self, timeout_s: float) -> bool:
        Current.world.pause(0.05)
        return True


class _Context:
    def __init__(self, process: Process) -> None:
        self._process = process

    def get_node_id(self) -> str:
        return f"{self._process.machine}-node"

    def get_actor_id(self) -> str:
        return self._process.actor_id


class Ray:
    """The module `ray`."""

    exceptions = ray.exceptions

    @staticmethod
    def get(ref: Ref | list[Ref], *, timeout: float | None = None) -> Any:
        if isinstance(ref, list):  # of the ranks of a host, which has one here
            return [Ray.get(each, timeout=timeout) for each in ref]
        if timeout is None and not ref.is_put:  # what was put is there; its fetch is part of an actor's call
            Current.world.violate(f"{Current.task().name} waits for an answer without a limit")
        if ref.is_put:
            Current.world.pause(CALL_S)
        return ref.wait(timeout)

    @staticmethod
    def wait(refs: list[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        ends_s = Current.world.now_s + timeout
        for ref in refs:
            with suppress(Exception):
                ref.wait(max(0.0, ends_s - Current.world.now_s))
        return [ref for ref in refs if ref.is_done], [ref for ref in refs if not ref.is_done]

    @staticmethod
    def put(value: Any) -> Ref:
        ref = Ref(is_put=True)
        ref.set(value)
        return ref

    @staticmethod
    def kill(handle: Handle) -> None:
        process = Current.task().process
        if not process.is_alive:
            Current.world.block()
        Current.world.after(CALL_S, handle._actor.process.kill)

    @staticmethod
    def remote(kind: Any) -> RemoteClass:
        return RemoteClass(kind)

    @staticmethod
    def nodes() -> list[dict[str, Any]]:
        resources = Ray.cluster_resources()
        return [
            {"NodeID": f"{each.machine}-node", "Alive": True, "Resources": resources}
            for each in Current.world.processes
        ]

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 8.0}

    @staticmethod
    def get_runtime_context() -> _Context:
        return _Context(Current.task().process)


@contextmanager
def joined_cluster(assembly: Any, *, is_verbose: bool) -> Iterator[None]:
    """In place of `pipeline.cluster.stream.cluster`: actors die when the driver leaves it."""
    Current.world.pause(START_S)
    process = Current.task().process
    try:
        yield
    finally:
        if process.is_alive:
            for child in process.children:
                Current.world.after(CALL_S, child.kill)


def nowhere(*args: Any, **options: Any) -> None:
    """In place of what says where an actor is to run."""


def ignore(*args: Any, **options: Any) -> None:
    """In place of what has no meaning here."""


class DataContext:
    """In place of Ray Data's settings."""

    @staticmethod
    def get_current() -> Any:
        return DataContext()


class Logging:
    """The module `logging`: a logger's level is of the whole process."""

    INFO, ERROR = 20, 40

    @staticmethod
    def getLogger(name: str) -> Any:  # noqa: N802
        return Logging

    @staticmethod
    def setLevel(level: int) -> None:  # noqa: N802
        pass


class Os:
    """The module `os`, which names a replica's process."""

    @staticmethod
    def getpid() -> int:
        return 1000 + Current.world.processes.index(Current.task().process)

    @staticmethod
    def _exit(code: int) -> None:
        Current.task().process.kill()


class Exporter:
    """`MetricExporter`: nobody reads the metrics."""

    def __init__(self, run: str) -> None:
        pass

    def export(self, process: str, replica: int, values: Any) -> None:
        pass

    def clear(self, replica: int, values: Any) -> None:
        pass
