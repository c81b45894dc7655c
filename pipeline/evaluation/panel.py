"""The panel: all judges of an evaluation, found and named before anything is decoded, seated where they score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config.sections import Section
from pipeline.errors import ConfigurationError
from pipeline.evaluation.judge_config import AnyJudge, ProfanityJudge, RewardModelJudge, SentimentJudge
from pipeline.evaluation.judges import Judge, text_judge
from pipeline.evaluation.reward_models import check_reward_model, load_reward_model
from pipeline.hub.sources import ModelSource, resolve_model

PACKAGES: dict[type[Section], str] = {SentimentJudge: "vaderSentiment", ProfanityJudge: "better-profanity"}
PLACEMENT = ("model", "revision", "resources", "device")  # the identity stands for the first two


@dataclass(frozen=True, slots=True)
class Panel:
    """The judges by name. Picklable; `seat` loads them in the process that scores.

    `digest` names everything that decides a score.
    """

    configs: Mapping[str, AnyJudge]
    sources: Mapping[str, ModelSource]
    cache_folder: Path
    digest: str

    @property
    def has_models(self) -> bool:
        return bool(self.sources)

    def seat(self) -> dict[str, Judge]:
        """The judges, models loaded. Raises ConfigurationError where one cannot be."""
        return {name: self._load(name) for name in self.configs}

    def _load(self, name: str) -> Judge:
        config = self.configs[name]
        if isinstance(config, RewardModelJudge):
            return load_reward_model(name, config, self.sources[name], self.cache_folder)
        return text_judge(config)


def call_panel(
    configs: Mapping[str, AnyJudge], cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None
) -> Panel:
    """Find the models and packages of all judges; no weights are loaded.

    Raises:
        ConfigurationError: a model is missing or gives no scores, or a package is not installed.
    """
    sources = {}
    for name, config in configs.items():
        if isinstance(config, RewardModelJudge):
            sources[name] = resolve_model(
                config.model.model,
                revision=config.model.revision,
                cache_folder=cache_folder,
                trust_remote_code=config.model.trust_remote_code,
                progress=progress,
            )
            check_reward_model(name, config, sources[name])
    described = {name: _describe(config, sources.get(name)) for name, config in configs.items()}
    text = json.dumps(described, sort_keys=True, allow_nan=False)
    return Panel(dict(configs), sources, cache_folder, hashlib.sha256(text.encode()).hexdigest())


def _describe(config: AnyJudge, source: ModelSource | None) -> dict[str, Any]:
    """What decides a judge's scores, as plain values."""
    described = config.model_dump(mode="json")
    if source is not None:
        described["identity"] = source.identity
        for key in PLACEMENT:
            described["model"].pop(key)
        described.pop("batch_size")
    if (package := PACKAGES.get(type(config))) is not None:
        try:
            described["version"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ConfigurationError(
                f"the {config.kind} judge needs the package {package}: install cage-align with the extra `evaluate`"
            ) from None
    return described
