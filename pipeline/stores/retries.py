"""Bounded retries of storage calls whose failure may be temporary: a full disk, a store that throttles or fails, a
credential that is being renewed.

The clients of object stores retry by themselves for a few seconds at most. These retries come on top of theirs.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_chain, wait_random

from pipeline.errors import CageError, StorageError
from pipeline.quoting import one_line

WAITS_S = (0.5, 2.0, 8.0)  # between the tries: one more try than waits
GIVE_UP_S = 120.0  # no further try after so long: a single call may itself take minutes to fail

TEMPORARY_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EREMOTEIO,  # s3fs raises it for a server's error 500
    errno.EBUSY,  # s3fs raises it for throttling
    errno.EAGAIN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
}
TEMPORARY_STATUS = {408, 409, 429, 500, 502, 503, 504}
TEMPORARY_WORDS = ("expired", "timeout", "timed out", "slowdown", "slow down", "throttl", "could not connect")

ANSWERS = (FileNotFoundError, FileExistsError, CageError)  # raised as they are, and never retried

T = TypeVar("T")


class _Repeats:
    """Counts repeated calls of this process; threads may miss each other's, which a count for people can bear."""

    count = 0

    @classmethod
    def add(cls, _: object) -> None:
        cls.count += 1


def num_repeats() -> int:
    """How often a call was repeated in this process so far."""
    return _Repeats.count


def retried(action: str, attempt: Callable[[], T]) -> T:
    """Call `attempt` and return its result; call it again after a failure that `may_pass`.

    Args:
        action: what `attempt` does, for the message; it completes "cannot ...".
        attempt: has to be safe to repeat. FileNotFoundError, FileExistsError and errors of this program are
            answers, not failures: they are raised as they are, and never retried.

    Raises:
        StorageError: one line with the last failure, and how often `attempt` was called.
    """
    started_s = time.monotonic()
    try:  # nearly every call succeeds at once, sooner than the retries are prepared
        return attempt()
    except ANSWERS:
        raise
    except Exception as error:
        failed = [error]

    def again() -> T:
        if failed:  # the first try was made
            raise failed.pop()
        return attempt()

    retrying = Retrying(
        stop=stop_after_attempt(len(WAITS_S) + 1) | stop_after_delay(GIVE_UP_S - (time.monotonic() - started_s)),
        # The jitter keeps many writers that failed together from coming back together.
        wait=wait_chain(*(wait_random(0.5 * wait_s, 1.5 * wait_s) for wait_s in WAITS_S)),
        retry=retry_if_exception(_is_worth_another_try),
        before_sleep=_Repeats.add,
        reraise=True,
    )
    try:
        return retrying(again)
    except ANSWERS:
        raise
    except Exception as error:  # the object stores' clients share no base class
        num_tries = retrying.statistics["attempt_number"]
        tried = f" (tried {num_tries} times in {time.monotonic() - started_s:.0f} s)" if num_tries > 1 else ""
        raise StorageError(f"cannot {action}: {one_line(error)}{tried}") from error


def _is_worth_another_try(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, ANSWERS) and may_pass(error)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed a little later, by the error and by what caused it."""
    return any(
        isinstance(each, TimeoutError)
        or getattr(each, "errno", None) in TEMPORARY_ERRNOS
        or http_status(each) in TEMPORARY_STATUS
        or any(word in str(each).lower() for word in TEMPORARY_WORDS)
        for each in _causes(error)
    )


def http_status(error: BaseException) -> int | None:
    """The HTTP status in the error of an object store's client, if there is one."""
    if isinstance(code := getattr(error, "code", None), int):  # gcsfs
        return code
    response = getattr(error, "response", None)  # botocore
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = metadata.get("HTTPStatusCode")
    return int(status) if status is not None else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__
