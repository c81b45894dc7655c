"""Read JSON files of a run for the report."""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage.run import Run


def read_object(run: Run, name: str, *, remedy: str) -> dict[str, Any] | None:
    """The JSON object in a file of the run; None where there is no file.

    Args:
        run: the run.
        name: the file.
        remedy: what to do about a damaged file, for the error message.

    Raises:
        StorageError: the file is not a JSON object.
    """
    data = run.store.read(name)
    if data is None:
        return None
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise StorageError(f"{run.store.url(name)} is not a JSON object; {remedy}")
    return tree
