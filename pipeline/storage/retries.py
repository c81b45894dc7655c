"""Another try, a bounded number of times, for what may pass: a full disk, a store that throttles or fails, a
credential that is being renewed.

The clients of object stores try again by themselves for a second or a few; this is the patience beyond them.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.errors import CageError, StorageError
from pipeline.storage.quoting import one_line

WAITS_S = (0.5, 2.0, 8.0)  # each times 0.5 to 1.5, so that many writers do not come back together
GIVE_UP_S = 120.0  # no further try after so long

PASSING_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EREMOTEIO,  # a server's error 500, as s3fs tells it
    errno.EBUSY,  # throttling, as s3fs tells it
    errno.EAGAIN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
}
PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504}
PASSING_WORDS = ("expired", "timeout", "timed out", "slowdown", "slow down", "throttl", "could not connect")

T = TypeVar("T")


def retried(action: str, attempt: Callable[[], T]) -> T:
    """The answer of `attempt`, which is called again after a failure that may pass.

    `action` completes "cannot ...". That there is such a file, or none, is told as it is.

    Raises:
        StorageError: one line with the last failure, and how often it was tried.
    """
    started_s = time.monotonic()
    waits_s = iter(WAITS_S)
    for number in range(1, len(WAITS_S) + 2):
        try:
            return attempt()
        except (FileNotFoundError, FileExistsError, CageError):
            raise
        except Exception as error:  # the object stores' clients share no base class
            waited_s = time.monotonic() - started_s
            wait_s = next(waits_s, None)
            if wait_s is None or waited_s > GIVE_UP_S or not may_pass(error):
                tried = f" (tried {number} times in {waited_s:.0f} s)" if number > 1 else ""
                raise StorageError(f"cannot {action}: {one_line(error)}{tried}") from error
        time.sleep(wait_s * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    return any(
        isinstance(each, TimeoutError)
        or getattr(each, "errno", None) in PASSING_ERRNOS
        or http_status(each) in PASSING_STATUS
        or any(word in str(each).lower() for word in PASSING_WORDS)
        for each in _causes(error)
    )


def http_status(error: BaseException) -> int | None:
    """The status that an object store's client put into its error, if any."""
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
