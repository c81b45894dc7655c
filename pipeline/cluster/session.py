"""The connection to Ray: the configured cluster, or one on this machine for as long as it is needed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import ray

from pipeline.cluster.ray_errors import first_reason
from pipeline.config.sections import ClusterConfig
from pipeline.errors import CageError, ConfigurationError
from pipeline.monitoring.waits import waiting_for

LISTENER = "ray_listen_error_messages"  # Ray's thread that prints errors of its processes


@contextmanager
def joined(config: ClusterConfig, *, num_cpus: float, is_verbose: bool) -> Iterator[None]:
    """Join the configured Ray cluster, or start one on this machine and stop it afterwards.

    A connection that exists already is used and kept.

    Args:
        config: names the cluster.
        num_cpus: that a cluster of its own must have at least.
        is_verbose: whether Ray's own output is shown.

    Raises:
        ConfigurationError: no cluster answers at the configured address.
        CageError: Ray cannot be started on this machine.
    """
    if ray.is_initialized():
        yield
        return
    with contextlib.nullcontext() if is_verbose else _quiet() as quiet:
        try:
            with waiting_for("starting Ray" if config.address is None else f"the Ray cluster at {config.address}"):
                _start(config, num_cpus=num_cpus, is_verbose=is_verbose)
            yield
        finally:
            if quiet is not None:
                quiet.is_stopping = True
            ray.shutdown()


def _start(config: ClusterConfig, *, num_cpus: float, is_verbose: bool) -> None:
    logging_options = {"log_to_driver": is_verbose, "logging_level": logging.INFO if is_verbose else logging.ERROR}
    if config.address is None:
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                # Ray counts CPUs and does not reserve them: on a small machine hosts may share cores
                num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)),
                **logging_options,
            )
        except Exception as error:  # Ray raises plain ones where its processes do not start
            raise CageError(f"Ray could not be started on this machine: {first_reason(error)}") from error
    else:
        try:
            ray.init(address=config.address, **logging_options)
        except ConnectionError as error:
            raise ConfigurationError(f"no Ray cluster answers at cluster.address {config.address}: {error}") from None


def describe_cluster(address: str) -> tuple[int, dict[str, float]]:
    """How many machines a cluster has, and what they have together. Raises ConfigurationError where none answers."""
    with joined(ClusterConfig(address=address), num_cpus=0, is_verbose=False):
        return sum(bool(node["Alive"]) for node in ray.nodes()), dict(ray.cluster_resources())


def lost_process() -> str | None:
    """Which of Ray's processes that this one started has ended; None where all run, or another machine has them.

    When its raylet ends, Ray ends this process some seconds later, without a word where its messages are not shown.
    """
    node = getattr(ray._private.worker, "_global_node", None)
    dead = node.dead_processes() if node is not None else []
    return str(dead[0][0]) if dead else None


class _WithoutRay:
    """Standard output without what Ray's listener prints: a line for every worker that dies, also by intention.

    Failures reach the user as errors of the run, with their reasons.

    Args:
        stream: the real one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_stopping = False  # Ray prints what it has kept back from the thread that stops it

    def write(self, text: str) -> int:
        is_rays = self.is_stopping or threading.current_thread().name == LISTENER
        return len(text) if is_rays else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _quiet() -> Iterator[_WithoutRay]:
    """Keep Ray's own messages out of the terminal."""
    stdout = sys.stdout
    quiet = _WithoutRay(stdout)
    with _silent_stderr():
        sys.stdout = cast(TextIO, quiet)
        try:
            yield quiet
        finally:
            sys.stdout = stdout


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Redirect file descriptor 2 to /dev/null: Ray's C++ code writes warnings there that no logging level reaches."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
