"""Small trainings: pairs that a tiny model can learn, and the job in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from pipeline.config.files import parse_as
from pipeline.stages.train import Trained, train
from pipeline.training.settings import TrainConfig


def pair_rows(num_prompts: int = 24, better: str = "a", worse: str = "b") -> list[dict[str, Any]]:
    """Pairs whose better side is made of one letter, and the worse side of another; two of each prompt."""
    return [
        {"prompt": f"question {at}", "chosen": better * (2 + at % 3 + each), "rejected": worse * (2 + at % 3 + each)}
        for at in range(num_prompts)
        for each in range(2)
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines; the path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def training_config(
    pairs: Path | str, output: Path | str, base: Path | str, *, source: dict[str, Any] | None = None, **training: Any
) -> TrainConfig:
    """A training of some steps; `source` is added to the section input, `training` to its own."""
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "validation": 0.25, **training}
    tree = {
        "input": {"path": str(pairs), **(source or {})},
        "output": {"path": str(output)},
        "base": str(base),
        "training": settings,
    }
    return parse_as(TrainConfig, tree)


class Said(io.StringIO):
    """What a training printed; raises at a line that begins so."""

    def __init__(self, stop_at: str | None = None, error: BaseException | None = None) -> None:
        super().__init__()
        self._stop_at, self._error = stop_at, error

    def write(self, text: str) -> int:
        if self._stop_at is not None and text.startswith(self._stop_at) and self._error is not None:
            raise self._error
        return super().write(text)


def run_training(config: TrainConfig, folder: Path, out: io.StringIO | None = None) -> Trained:
    """Bring a training to its end."""
    trained = train(config, folder / "cache", out or io.StringIO())
    assert trained is not None
    return trained
