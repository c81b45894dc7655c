"""The panel: all judges of an evaluation, checked before anything is decoded and loaded where they score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluation.judges.interface import Judge, JudgeConfig, JudgeContext
from pipeline.sections import ModelConfig

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource


@dataclass(frozen=True, slots=True)
class Panel:
    """The judges by name. Picklable: each process that scores calls `load`.

    Args:
        configs: the section of each judge.
        sources: the resolved models of those judges that are models.
        cache_folder: where downloaded weights are kept.
        digest: names everything that decides a score; scores of another digest are made again.
    """

    configs: Mapping[str, JudgeConfig]
    sources: Mapping[str, ModelSource]
    cache_folder: Path
    digest: str

    @property
    def has_models(self) -> bool:
        return bool(self.sources)

    @property
    def required_models(self) -> list[ModelConfig]:
        """The models that `load` puts into memory, for the resources to reserve."""
        models = [config.required_model for config in self.configs.values()]
        return [model for model in models if model is not None]

    def load(self) -> dict[str, Judge]:
        """All judges with their models loaded. Raises ConfigurationError where one cannot be."""
        return {
            name: config.load(JudgeContext(name, self.cache_folder, self.sources.get(name)))
            for name, config in self.configs.items()
        }


def resolve_panel(
    configs: Mapping[str, JudgeConfig], cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None
) -> Panel:
    """Find the models and packages of all judges; no weights are loaded.

    Raises:
        ConfigurationError: a model is missing or gives no scores, or a package is not installed.
    """
    sources: dict[str, ModelSource] = {}
    for name, config in configs.items():
        if config.required_model is not None:
            from pipeline.hub.sources import resolve_configured  # takes seconds, and most judges have no model

            sources[name] = resolve_configured(config.required_model, cache_folder, progress=progress)
        config.check(JudgeContext(name, cache_folder, sources.get(name)))
    identities = {name: config.identity(sources.get(name)) for name, config in configs.items()}
    text = json.dumps(identities, sort_keys=True, allow_nan=False)
    return Panel(dict(configs), sources, cache_folder, hashlib.sha256(text.encode()).hexdigest())
