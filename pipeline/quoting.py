"""How values from outside appear in messages: on one line, cut, without control characters."""

from __future__ import annotations

from typing import Any


def quote(value: Any, *, limit: int = 60) -> str:
    """Show a value: control characters and lone surrogates escaped, cut to `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(error: BaseException | str, *, limit: int = 300) -> str:
    """The text of an error on one printable line; its class where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def size(num_bytes: float) -> str:
    """Bytes for people: 538 MB, 1.3 GB (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}" if num_bytes < 10 * scale else f"{num_bytes / scale:,.0f} {unit}"
    return f"{num_bytes:.0f} B"
