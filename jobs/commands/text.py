"""Plain text for a terminal: data is never printed raw."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path


def printable(text: str) -> str:
    """Escape control characters, so that data cannot steer a terminal; line breaks and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def shown_path(path: str) -> str:
    """A folder below the current one by its relative path, as one would type it."""
    here = Path.cwd()
    if "://" in path or not Path(path).is_relative_to(here):
        return printable(path)
    return printable(str(Path(path).relative_to(here)))


def indented(text: str, *, width: int = 100) -> str:
    """Wrapped and indented by two, its own line breaks kept."""
    lines = printable(text).splitlines() or [""]
    return "\n".join(
        textwrap.fill(line, width, initial_indent="  ", subsequent_indent="  ", break_long_words=False) or ""
        for line in lines
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces; the first to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:z.{digits}f}"  # z: what rounds to -0 is 0
