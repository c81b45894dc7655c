"""What a run is connected to: the stores that it opens, and wrappers around its hosts.

By default stores are opened as they are and no host is wrapped. Tests supply others, which inject faults: a store or
a host that ends its process, fails, hangs or is slow at a named point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.protocol.hosts import Scores
from pipeline.stores.store import Store, open_store

HostT = TypeVar("HostT", bound=Scores)


class WrapHost(Protocol):
    """Wraps a host that was just started, in the host's own process."""

    def __call__(self, host: HostT, /) -> HostT: ...


def unwrapped(host: HostT, /) -> HostT:
    """The host as it is."""
    return host


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a run opens stores and wraps hosts. Picklable, as it is sent to other processes.

    Args:
        open_store: opens the store at an address.
        wrap_host: called with every host that was started; what it returns takes the host's place.
    """

    open_store: Callable[[str], Store] = open_store
    wrap_host: WrapHost = unwrapped


DIRECT = Wiring()
