"""`cage retry`: run rows of a run again, those that failed or those of a mended input."""

from __future__ import annotations

import os
from collections.abc import Collection


def run_retry(
    path: str, overrides: list[str], *, only: Collection[str] = (), mended: str | None = None, is_verbose: bool
) -> None:
    """Run the rows again and describe the run that has them then."""
    from jobs.commands.status import describe_status, status_fields
    from jobs.logs import command_log, show_result
    from pipeline.hub.embedded import default_cache_folder
    from pipeline.stages.retry import Retry, retry

    asked = Retry(path, tuple(overrides), tuple(only), mended)
    with command_log() as out:
        run, was_run = retry(asked, default_cache_folder(os.environ), out, is_verbose=is_verbose)
    nothing = "" if was_run else "nothing to do\n"
    show_result(lambda: nothing + describe_status(run), was_run=was_run, **status_fields(run))
