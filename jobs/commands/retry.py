"""`cage retry`: run rows of a run again, those that failed or those of a mended input."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection


def run_retry(
    path: str, overrides: list[str], *, only: Collection[str] = (), mended: str | None = None, is_verbose: bool
) -> None:
    """Run the rows again and describe the run that has them then."""
    from jobs.commands.status import describe_status
    from pipeline.hub.embedded import default_cache_folder
    from pipeline.stages.retry import Retry, retry

    asked = Retry(path, tuple(overrides), tuple(only), mended)
    # a descriptor of its own: the run sends file descriptor 2, on which Ray's C++ code writes, elsewhere
    with os.fdopen(os.dup(sys.stderr.fileno()), "w") as out:
        run, was_run = retry(asked, default_cache_folder(os.environ), out, is_verbose=is_verbose)
    if not was_run:
        print("nothing to do")
    print(describe_status(run))
