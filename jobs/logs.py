"""Where a command logs: standard error for people; with --log-format json events, also for results and errors."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from pipeline.errors import CageError, ExitCode, Interrupted
from pipeline.monitoring.events import EventLog, Level, LogFormat

INTERRUPTED = "interrupted; what is committed is kept, and the same command continues"


class _Chosen:
    """The log of this process's command: what ends the command is written to it, too."""

    events: EventLog | None = None


def choose_format(log_format: LogFormat, *, is_verbose: bool) -> None:
    """Set how this process's command logs. It has to be set before anything is printed."""
    if log_format is LogFormat.TEXT:
        _Chosen.events = None
        return
    # a descriptor of its own: a run sends file descriptor 2, on which Ray's C++ code writes, elsewhere
    out = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="backslashreplace")
    events = _Chosen.events = EventLog(out, keeps_values=is_verbose)

    def warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        events.event("warning", level=Level.WARNING, kind=category.__name__, text=events.shown(str(message)))

    warnings.showwarning = warn


@contextmanager
def command_log() -> Iterator[TextIO]:
    """The stream that a job prints to while it runs."""
    if _Chosen.events is not None:
        yield cast(TextIO, _Chosen.events)
        return
    with os.fdopen(os.dup(sys.stderr.fileno()), "w") as out:
        yield out


def show_result(text: Callable[[], str], **fields: Any) -> None:
    """Print what a command came to: a text on standard output, or an event `result` with these fields."""
    if _Chosen.events is None:
        print(text())
    else:
        _Chosen.events.event("result", **fields)


def report_end(end: BaseException) -> int:
    """Say what ended the command; its exit code."""
    code = end.exit_code if isinstance(end, (CageError, Interrupted)) else ExitCode.FAILED
    events = _Chosen.events
    if events is not None:
        is_known = isinstance(end, CageError)
        text = INTERRUPTED if isinstance(end, Interrupted) else events.shown(str(end)) if is_known else _where(end)
        events.event("error", level=Level.ERROR, kind=type(end).__name__, text=text, exit_code=int(code))
    elif isinstance(end, Interrupted):
        print(f"cage: {INTERRUPTED}", file=sys.stderr)
    elif isinstance(end, CageError):
        print(f"cage: {end}", file=sys.stderr)
    else:
        traceback.print_exception(end)
    return code


def _where(end: BaseException) -> str:
    """The places of an error that nobody expected, the innermost last. Its message may quote a row."""
    frames = traceback.extract_tb(end.__traceback__)
    return " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
