"""`--watch` of `cage status`: with a number of seconds or without one."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

EVERY_S = "10"  # of a --watch without a number


class WatchCommand(TyperCommand):
    """A command whose `--watch` needs no number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every `--watch` that has no number its seconds."""
        return super().parse_args(ctx, with_seconds(args))


def with_seconds(args: list[str]) -> list[str]:
    """The words of a command line, with seconds behind each `--watch` that is not followed by a number."""
    found = []
    for word, following in zip(args, [*args[1:], ""], strict=True):
        found.append(word)
        if word == "--watch" and not _is_number(following):
            found.append(EVERY_S)
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
