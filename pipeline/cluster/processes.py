"""Objects in processes of their own on a cluster of this machine, for benchmarks of what runs between processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray


@contextmanager
def local_cluster(*, num_cpus: int) -> Iterator[None]:
    """A cluster on this machine for as long as the block runs; its CPUs are only counted, not reserved."""
    ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def started(kind: type[Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Actor handles of one object for each tuple of arguments, each in a process of its own; they end with the block.

    A handle may be an argument of another object.
    """
    actor_class = ray.remote(kind).options(num_cpus=1)
    handles = [actor_class.remote(*each) for each in arguments]
    try:
        yield handles
    finally:
        for handle in handles:
            ray.kill(handle)


def call_all(handles: Sequence[Any], method: str, *arguments: Any) -> list[Any]:
    """Call a method of all of them at the same time; what each returned, in their order."""
    answers: list[Any] = ray.get([getattr(handle, method).remote(*arguments) for handle in handles])
    return answers
