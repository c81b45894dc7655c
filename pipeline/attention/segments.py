"""Parts of cache rows that a pass computes or copies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of a prompt, for cache row `row`; computed together, after what stands before them."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Copied:
    """Tokens [start, stop) that `row` takes over from the cache row `source`."""

    source: int
    row: int
    start: int
    stop: int
