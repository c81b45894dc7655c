"""A model of the actor pool of Ray Data, which restarts a dead replica and repeats its calls without limit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from ray.exceptions import RayTaskError

from simulation.cluster import CALL_S, Actor, Ray
from simulation.threads import Current, SimpleQueue, Waiters
from simulation.world import Process


class RayWithData(Ray):
    """The module `ray`, with `ray.data`."""

    class data:  # noqa: N801
        """The module `ray.data`."""

        @staticmethod
        def from_items(items: Sequence[dict[str, Any]], *, override_num_blocks: int) -> Dataset:
            return Dataset(items)


class ActorPoolStrategy:
    """How many replicas, and how many of their calls at once."""

    def __init__(self, *, max_size: int, max_tasks_in_flight_per_actor: int, **options: Any) -> None:
        self.size, self.in_flight = max_size, max_tasks_in_flight_per_actor


class Dataset:
    """A stream of rows, through an actor pool."""

    def __init__(self, items: Sequence[dict[str, Any]]) -> None:
        self._items = items
        self._pool: Pool | None = None

    def map_batches(
        self, kind: Any, *, fn_constructor_args: Sequence[Any], compute: ActorPoolStrategy, **options: Any
    ) -> Dataset:
        self._pool = Pool(kind, fn_constructor_args, compute, self._items)
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        pool = self._pool
        assert pool is not None
        pool.start()
        try:
            for _ in self._items:
                yield pool.next_row()
        finally:
            pool.stop()


class Pool:
    """The actor pool of Ray Data, as it runs beside the driver.

    Args:
        kind: the class of its actors, each of which is called with batches of one row.
        args: of their constructors.
        compute: how many.
        items: the rows.
    """

    def __init__(self, kind: Any, args: Sequence[Any], compute: ActorPoolStrategy, items: Sequence[Any]) -> None:
        self._kind, self._args, self._compute = kind, args, compute
        self._waiting: deque[Any] = deque(items)
        self._given: dict[int, list[Any]] = {}  # rows by replica, while they run
        self._actors: dict[int, Actor] = {}
        self._results = SimpleQueue()
        self._changed = Waiters()
        self._is_stopped = False
        self._driver: Process | None = None

    def start(self) -> None:
        self._driver = Current.task().process
        for number in range(self._compute.size):
            self._start_actor(number, None)

    def stop(self) -> None:
        self._is_stopped = True
        for actor in self._actors.values():
            Current.world.after(CALL_S, actor.process.kill)

    def next_row(self) -> dict[str, Any]:
        found = self._results.get()
        if isinstance(found, BaseException):
            raise found
        return {name: values[0] for name, values in found.items()}

    def _start_actor(self, number: int, actor_id: str | None) -> None:
        driver = self._driver
        assert driver is not None
        if self._is_stopped or not driver.is_alive:
            return
        world = Current.world
        before, world.current = world.current, None
        actor = Actor(_Idle, (self._kind, self._args), driver, f"w{world.num_actors % 3}")
        world.current = before
        actor.process.actor_id = actor_id or actor.process.name
        actor.process.at_death.append(lambda: self._lost(number, actor))
        self._actors[number] = actor
        self._given[number] = []
        actor.process.start(lambda: self._feed(number, actor), name="feed")

    def _feed(self, number: int, actor: Actor) -> None:
        """Give the replica rows as long as it takes some; a task of its process for each."""
        actor.is_ready.wait()
        given, numbers = self._given[number], iter(range(1_000_000))
        while True:
            self._changed.wait(lambda: bool(self._waiting) and len(given) < self._compute.in_flight, None)
            item = self._waiting.popleft()
            given.append(item)
            actor.process.start(lambda item=item: self._run(actor, given, item), name=f"call{next(numbers)}-")
            Current.world.pause(CALL_S)

    def _run(self, actor: Actor, given: list[Any], item: Any) -> None:
        result = actor.instance.callable({name: [value] for name, value in item.items()})
        Current.world.pause(CALL_S)
        given.remove(item)
        self._results.put(result)
        self._changed.wake()

    def _lost(self, number: int, actor: Actor) -> None:
        """A replica died: its rows run again on another one."""
        world, driver = Current.world, self._driver
        if self._is_stopped or driver is None or not driver.is_alive:
            return
        if actor.init_error is not None:
            error = RayTaskError("Replica.__init__", str(actor.init_error), actor.init_error)
            self._results.put(error)
            return
        self._waiting.extend(self._given[number])
        self._changed.wake()
        is_same = world.unit(f"{actor.process.name} restarts") < 0.7
        actor_id = actor.process.actor_id if is_same else None
        world.after(1.0, lambda: self._start_actor(number, actor_id))


class _Idle:
    """What Ray Data makes of a class: an actor that holds an instance of it."""

    def __init__(self, kind: Any, args: Sequence[Any]) -> None:
        self.callable = kind(*args)
