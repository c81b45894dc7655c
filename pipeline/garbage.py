"""Python's garbage collector, where it gets in the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused(*, is_for_good: bool = False) -> Iterator[None]:
    """No garbage collection inside the block.

    Importing torch and transformers makes millions of objects that live on. The collector visits them again and
    again, which takes a quarter of the time and frees nothing.

    Args:
        is_for_good: the collector never looks at what exists after the block, anywhere in the process: for a process
            of our own, not for a user's.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_for_good:
            gc.freeze()
        if was_enabled:
            gc.enable()
