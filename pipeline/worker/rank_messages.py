"""What the parent of a rank's process and the process say to each other, over a socket pair."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from pipeline.errors import CageError

if TYPE_CHECKING:
    from pipeline.protocol.specs import HostSpec, RankPlace


@dataclass(frozen=True, slots=True)
class Start:
    """What a rank begins with.

    Args:
        spec: of the host.
        place: which rank it is.
        is_base: whether the host is the base's, which proposes.
        wrap_host: wraps the rank's host.
    """

    spec: HostSpec
    place: RankPlace
    is_base: bool
    wrap_host: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Message:
    """A call of a method of the host, such as `advance`."""

    method: str
    arguments: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a message gave.

    Args:
        value: what the method returned.
        error: what it raised.
        warnings: the texts of warnings that were given meanwhile.
    """

    value: Any = None
    error: CageError | None = None
    warnings: tuple[str, ...] = ()


def send(connection: Connection, value: Any) -> None:
    """Send a value. Not by the connection's own pickling, which would pass tensors by shared memory."""
    connection.send_bytes(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """The next value that was sent. Raises EOFError or OSError where the other end is closed."""
    return pickle.loads(connection.recv_bytes())
