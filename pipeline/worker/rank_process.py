"""A process that is one rank of a tensor parallel host: `python -m pipeline.worker.rank_process FILE_DESCRIPTOR`.

Its parent starts one for each rank and sends the same messages to all of them. The process ends when the parent
closes its end of the socket pair, also where the parent is killed.
"""

from __future__ import annotations

import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

from pipeline.errors import CageError, HostError
from pipeline.worker.rank_messages import Answer, Message, Start, receive, send


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = receive(connection)  # of the parent: what it sends is found where the parent found it
    host: Any = None
    while True:
        try:
            message: Message | Start = receive(connection)
        except (EOFError, OSError):
            return
        if isinstance(message, Start):
            host = None  # before another takes its memory
            answer, host = _start(message)
        else:
            answer = _call(host, message)
        try:
            send(connection, answer)
        except OSError:
            return


def _start(start: Start) -> tuple[Answer, Any]:
    """Load the host. What it raises is in the answer, and there is no host then."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            # heavy, for this process alone
            from pipeline.worker.start import start_rank

            host = start_rank(start.spec, start.place, is_base=start.is_base, wrap_host=start.wrap_host)
        except Exception as error:
            return Answer(error=_as_error(error)), None
    texts = (str(each.message) for each in given if issubclass(each.category, RuntimeWarning))
    return Answer(warnings=tuple(dict.fromkeys(texts))), host


def _call(host: Any, message: Message) -> Answer:
    try:
        value = getattr(host, message.method)(*message.arguments, **message.named)
        return Answer(value.result() if message.method == "advance_and_sample" else value)
    except Exception as error:
        return Answer(error=_as_error(error))


def _as_error(error: Exception) -> CageError:
    """The error as the parent can raise it: others than ours need not be picklable."""
    return error if isinstance(error, CageError) else HostError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
