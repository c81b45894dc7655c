"""Processes of Ray to kill, and a cluster of several nodes on this machine whose nodes can be lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

SPAWN = multiprocessing.get_context("spawn")  # a fork of a process that knows Ray would not work
NODE_CPUS = 4
NUM_NODES = 2
ANSWER_S = 600.0

# how Ray names its processes
MARKS = {
    "host": "ray::HostActor",
    "coordinator": "ray::MapWorker",
    "worker": "ray::",
    "node": "raylet",
}


def find(parent: int, mark: str) -> list[psutil.Process]:
    """The processes below `parent` whose title, or program, begins with `mark`."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(name.startswith(mark) for name in (process.name(), *process.cmdline()[:1])):
                    found.append(process)
    return found


def kill_one(parent: int, mark: str, chance: random.Random) -> bool:
    """SIGKILL one of them; whether there was one."""
    found = find(parent, mark)
    if not found:
        return False
    with contextlib.suppress(psutil.Error):
        chance.choice(found).kill()
    return True


@dataclass(frozen=True)
class RayNodes:
    """A head node without CPUs for replicas, where drivers connect, and worker nodes."""

    address: str
    pid: int
    ask: Callable[[str], Any]

    def lose_node(self, chance: random.Random) -> None:
        """SIGKILL a worker node's processes and start another."""
        self.ask(f"lose {chance.randrange(NUM_NODES)}")


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve_nodes, args=(there,))
    process.start()

    def ask(what: str) -> Any:
        here.send(what)
        if not here.poll(ANSWER_S):
            raise RuntimeError(f"the cluster did not answer to {what} within {ANSWER_S:g} s")
        return here.recv()

    try:
        yield RayNodes(ask("address"), process.pid or 0, ask)
    finally:
        with contextlib.suppress(BrokenPipeError, EOFError, RuntimeError):
            ask("stop")
        process.join(30)
        process.kill()


def _serve_nodes(requests: Connection) -> None:
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_agent_register_timeout_ms": "300000",
    }
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=NODE_CPUS) for _ in range(NUM_NODES)]
    while True:
        what = requests.recv()
        if what == "stop":
            cluster.shutdown()
            requests.send(None)
            return
        if what.startswith("lose "):
            cluster.remove_node(nodes.pop(int(what.split()[1])), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=NODE_CPUS))
        requests.send(cluster.address)
