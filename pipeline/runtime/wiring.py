"""What a run is connected to: the stores that it opens, and what stands between it and its hosts.

A run that nobody watches opens stores as they are and wraps no host. Tests and simulations supply others: a store or
a host that ends its process, fails, hangs or is slow at a named point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipeline.protocol.hosts import Scores
from pipeline.storage.stores import Store, open_store

HostT = TypeVar("HostT", bound=Scores)


class WrapHost(Protocol):
    """Puts something around a host that was just started, in the host's own process."""

    def __call__(self, host: HostT, /) -> HostT: ...


def unwrapped(host: HostT, /) -> HostT:
    """The host as it is."""
    return host


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a run opens stores and starts hosts. Picklable, as other processes do so, too.

    Args:
        open_store: opens the store at an address.
        wrap_host: called with every host that was started; what it returns takes the host's place.
    """

    open_store: Callable[[str], Store] = open_store
    wrap_host: WrapHost = unwrapped


DIRECT = Wiring()
