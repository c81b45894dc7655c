"""What a training says while it runs, and the marks of its whole checkpoints. Importing this takes seconds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pipeline.monitoring.progress import duration

WHOLE = "_whole"  # a file in a checkpoint that was written to its end
PREFIX = "checkpoint-"


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Prints loss, accuracy and the time left, and marks checkpoints when they are whole.

    Args:
        name: what is trained.
        say: prints a line.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._began = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = (time.monotonic(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self._say(self.line(state, logs))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX}{state.global_step}" / WHOLE).touch()

    def line(self, state: Any, logs: dict[str, float]) -> str:
        """The line for a step."""
        began_s, first = self._began
        done = state.global_step - first
        left = (time.monotonic() - began_s) / max(done, 1) * (state.max_steps - state.global_step)
        parts = [f"{self._name}: step {state.global_step:,}/{state.max_steps:,}", f"loss {logs['loss']:.4g}"]
        if "rewards/accuracies" in logs:
            parts.append(f"accuracy {logs['rewards/accuracies']:.3f}")
        return "  ".join([*parts, f"{duration(left)} left"])


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole; those that were cut off are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX}*"):
        if (path / WHOLE).is_file():
            found[int(path.name.removeprefix(PREFIX))] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None
