"""`cage train`: train principals and say what they are worth."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from jobs.commands.text import indented, printable, shown_path
from jobs.logs import command_log, show_result
from pipeline.config.files import load_as
from pipeline.hub.embedded import default_cache_folder
from pipeline.training.processes import Processes
from pipeline.training.report import configuration_lines, describe_results
from pipeline.training.settings import TrainConfig


def run_train(
    config_file: Path, overrides: list[str], *, print_config: bool = False, is_verbose: bool = False
) -> None:
    """Read the configuration, train, and print the lines that use the principals."""
    config = load_as(TrainConfig, config_file, overrides)
    if print_config:
        sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        return
    from pipeline.stages.train import train

    # set by `accelerate launch` and `torchrun`, which start a process for each device
    processes = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    with command_log() as out:
        trained = train(config, default_cache_folder(os.environ), out, processes=processes, is_verbose=is_verbose)
    if trained is None:
        return
    path = str(trained.folder.path)
    lines = [] if trained.was_trained else ["nothing to do: the principals are trained"]
    lines.append(f"{shown_path(path)}: complete")
    lines += [indented(printable(line)) for facts in trained.results for line in describe_results(facts)]
    lines += [f"  report    {shown_path(path)}/_report.md", "", "in a configuration:", ""]
    lines.append(configuration_lines(config, trained.results))
    show_result(
        lambda: "\n".join(lines),
        was_run=trained.was_trained,
        path=path,
        principals=[facts["name"] for facts in trained.results],
    )
