"""`cage train`: train principals and say what they are worth."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from jobs.commands.text import indented, printable, shown_path
from pipeline.config.files import load_as
from pipeline.hub.embedded import default_cache_folder
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
    is_main = os.environ.get("RANK", "0") == "0"
    with os.fdopen(os.dup(sys.stderr.fileno()), "w") as out:
        trained = train(config, default_cache_folder(os.environ), out, is_main=is_main, is_verbose=is_verbose)
    if trained is None:
        return
    if not trained.was_trained:
        print("nothing to do: the principals are trained")
    print(f"{shown_path(str(trained.folder.path))}: complete")
    for facts in trained.results:
        for line in describe_results(facts):
            print(indented(printable(line)))
    print(f"  report    {shown_path(str(trained.folder.path))}/_report.md")
    print("\nin a configuration:\n")
    print(configuration_lines(config, trained.results))
