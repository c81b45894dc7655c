"""Which job a configuration file is for, by the section that only this job has."""

from __future__ import annotations

from pathlib import Path

from pipeline.advice.settings import AdviseConfig
from pipeline.config.files import load_as, read_yaml
from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.synthesis.settings import SynthesizeConfig
from pipeline.training.settings import TrainConfig

TRAINING = "training"
KIND_BY_SECTION: dict[str, type[Config]] = {
    "evaluation": EvaluateConfig,
    "synthesis": SynthesizeConfig,
    "advise": AdviseConfig,
}


def load_job(path: Path, overrides: list[str] | None = None) -> Config | TrainConfig:
    """Read a configuration of any job. Raises ConfigurationError."""
    try:
        tree = read_yaml(path)
    except ConfigurationError:
        tree = None  # load_as reports the error
    sections = tree if isinstance(tree, dict) else {}
    if TRAINING in sections:
        return load_as(TrainConfig, path, overrides)
    kind = next((kind for section, kind in KIND_BY_SECTION.items() if section in sections), Config)
    return load_as(kind, path, overrides)
