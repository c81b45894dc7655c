"""Named points of a run at which something may watch: where tests end a process, and what they prove by it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Point(StrEnum):
    """Where a process can die with the most at stake. The first two are a host's, the last the driver's."""

    MID_PREFILL = "mid prefill"
    MID_STEP = "mid step"
    BEFORE_DATA = "before data"
    AFTER_DATA = "after data"
    AFTER_COMMIT = "after commit"
    BEFORE_MANIFEST = "before manifest"


# Called with the point and what is at hand there: admissions, tokens, or a file's name. Picklable where Ray is used.
Watcher = Callable[[Point, object], None]


def unwatched(point: Point, detail: object) -> None:
    """Nothing watches: the ordinary case."""
