"""`cage relabel`: run the main job."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jobs.logs import command_log, show_result
from pipeline.config.files import dump_config, load_config
from pipeline.config.sections import Config


def run_relabel(
    config_file: Path,
    overrides: list[str],
    *,
    print_config: bool,
    is_new_run: bool,
    may_extend: bool,
    is_verbose: bool,
) -> None:
    """Read the configuration, run the job, say what was written and how to look at it."""
    config = load_config(config_file, overrides)
    if print_config:
        sys.stdout.write(dump_config(config))
        return
    run_config(config, is_new_run=is_new_run, may_extend=may_extend, is_verbose=is_verbose)


def run_config(config: Config, *, is_new_run: bool = False, may_extend: bool = False, is_verbose: bool) -> None:
    """Run the job to its end and describe the run."""
    from jobs.commands.status import describe_status, status_fields
    from pipeline.hub.embedded import default_cache_folder
    from pipeline.stages.relabel import relabel

    cache_folder = default_cache_folder(os.environ)
    with command_log() as out:
        run, was_run = relabel(
            config, cache_folder, out, is_verbose=is_verbose, may_begin_beside=is_new_run, may_extend=may_extend
        )
    nothing = "" if was_run else "nothing to do: the run is complete\n"
    show_result(lambda: nothing + describe_status(run), was_run=was_run, **status_fields(run))
