"""Ray's own messages stay out of the terminal, and its errors are said in a few words."""

from __future__ import annotations

import io
import sys
import threading

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayTaskError

from pipeline.cluster import session
from pipeline.cluster.ray_errors import LONGEST, first_reason, lost_actor

DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called."
)
NODE = "The actor died because its node has died. Node Id: 88d2\n\tthe actor's node was terminated unexpectedly."


def died(message: str) -> ActorDiedError:
    context = {"error_message": message, "class_name": "HostActor", "actor_id": b"x" * 16, "pid": 24920}
    return ActorDiedError(ActorDiedErrorContext(**context))


def failed_at_start() -> ActorDiedError:
    return ActorDiedError(
        RayTaskError("init", "Traceback\n  line 1\nValueError: no such file", ValueError("no such file"))
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (died(DIED), "the process died: it was killed"),
        (died(NODE), "the machine was lost"),
        (failed_at_start(), "the process failed as it started: ValueError: no such file"),
        (NodeDiedError("gone"), "the machine was lost"),
        (OutOfMemoryError("task killed"), "memory of its machine was nearly used up"),
        (ActorUnavailableError("no answer", b"x" * 16), "the process does not answer"),
    ],
)
def test_a_lost_actor_is_said_in_a_few_words(error, said):
    shown = lost_actor(error)
    assert said in shown
    assert len(shown) < 140
    assert not {"actor_id", "pid", "\n"} & set(shown.split())
    assert first_reason(error) == shown or not isinstance(error, ActorDiedError)


def test_the_first_reason_of_a_failed_task_is_what_the_task_raised():
    traceback = "ray::task()\n  File x, line 1\n" * 50
    failed = RayTaskError("task", traceback, ValueError("the real reason"))
    assert first_reason(failed) == "ValueError: the real reason"
    shown = first_reason(RuntimeError("first this " + "and so on " * 200))
    assert shown.startswith("RuntimeError: first this")
    assert len(shown) == LONGEST


def test_rays_listener_prints_nothing_and_others_do(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with session._quiet() as quiet:
        listener = threading.Thread(target=print, args=("(raylet) A worker died",), name=session.LISTENER)
        listener.start()
        listener.join()
        print("a line of ours", flush=True)
        quiet.is_stopping = True
        print("(raylet) what Ray kept back")
    assert shown.getvalue() == "a line of ours\n"
    assert sys.stdout is shown


@pytest.mark.ray
def test_ray_has_a_listener_of_that_name(ray_cluster):
    assert session.LISTENER in {thread.name for thread in threading.enumerate()}
    assert ray.is_initialized()


class _Node:
    """A node of Ray with processes that have ended."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def dead_processes(self) -> list[tuple[str, None]]:
        return [(name, None) for name in self._names]


def test_a_process_of_ray_that_ended_is_named(monkeypatch):
    for node, name in ((None, None), (_Node(), None), (_Node("raylet"), "raylet")):
        monkeypatch.setattr(ray._private.worker, "_global_node", node)
        assert session.lost_process() == name


@pytest.mark.ray
def test_a_cluster_that_runs_has_lost_nothing(ray_cluster):
    assert ray._private.worker._global_node.dead_processes() == []
    assert session.lost_process() is None
