"""What a row that cannot be read was given as: its values as text, and the weights among them that are numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

GIVEN_LIMIT = 2**20  # characters that are kept of one row


def given_text(values: Mapping[str, Any] | bytes) -> str:
    """The values by column as JSON text, or a line that is no object as it is; cut at `GIVEN_LIMIT` characters."""
    if isinstance(values, bytes):
        text = values[: 4 * GIVEN_LIMIT].decode("utf-8", errors="backslashreplace")
    else:
        try:
            text = json.dumps(values, default=_plain)  # escapes what is not ASCII, lone surrogates among it
        except (ValueError, TypeError, RecursionError):
            text = json.dumps({name: str(type(value).__name__) for name, value in values.items()})
    return text[:GIVEN_LIMIT]


def readable_weights(value: Any, principal_names: Sequence[str]) -> dict[str, float | None] | None:
    """The weights by principal as given, None where one is no usable number; all None where they are no object."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = ()
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # an Arrow map
    if not isinstance(value, dict):
        return dict.fromkeys(principal_names)
    return {name: as_number(value[name]) for name in principal_names if name in value}


def as_number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _plain(value: Any) -> str:
    reason = getattr(value, "reason", None)  # of a value that could not be decoded
    return str(value) if reason is None else f"<{reason}>"
