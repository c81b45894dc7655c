"""What every judge has in common: the section that describes it, and the object that scores."""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from pipeline.errors import CageError, ConfigurationError
from pipeline.records import Message
from pipeline.sections import ModelConfig, Section

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource  # imports transformers: seconds

Sign = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """An answer as a judge sees it.

    Args:
        prompt: the conversation before the answer.
        text: the answer.
        num_tokens: its length in tokens, the end token included.
        rewards: by principal, the sum of its token reward q over the answer in nats; None where it was not recorded.
    """

    prompt: Sequence[Message]
    text: str
    num_tokens: int = 0
    rewards: Mapping[str, float | None] = field(default_factory=dict)


class JudgeFailed(CageError):
    """A judge had an error for every answer that it was asked about."""


class NoScore(float):
    """NaN in the place of a score that could not be had, with the reason. It is counted, and never taken for 0.

    Scaled or compared with another score it stays what it is.

    Args:
        reason: in a line.
        is_final: whether asking again would give the same; where not, the next run asks again.
    """

    reason: str
    is_final: bool

    def __new__(cls, reason: str, *, is_final: bool = True) -> NoScore:
        self = super().__new__(cls, math.nan)
        self.reason = reason
        self.is_final = is_final
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_score, (self.reason, self.is_final)

    def _itself(self, other: float) -> NoScore:
        """Arithmetic gives no score either, and keeps the reason."""
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _itself


def _no_score(reason: str, is_final: bool) -> NoScore:
    return NoScore(reason, is_final=is_final)


def why_missing(score: float) -> str:
    """Why a score that is not finite is none."""
    return score.reason if isinstance(score, NoScore) else f"its score is {float(score)}"


class Judge(Protocol):
    """An object that scores answers. It may hold a model."""

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """One score per answer, in order; `NoScore`, or NaN, where an answer cannot be scored.

        An answer's score must not depend on the other answers of the call: shards are scored separately, and other
        shards may be scored by another process.
        """
        ...


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """What a judge may need to load.

    Args:
        name: the judge's name in the configuration, for error messages.
        cache_folder: where downloaded and converted weights are kept.
        source: the model of `JudgeConfig.required_model`, already resolved; None for a judge without one.
    """

    name: str
    cache_folder: Path = Path()
    source: ModelSource | None = None


class JudgeConfig(Section):
    """The section of one judge. A kind of judge is a subclass with a field `kind` and the method `load`.

    The score is the quantity that the judge measures times `scale`; with `sign: lower`, less of the quantity is
    better, and the score is negated, so that a higher score is always better.
    """

    sign: Sign = Field("higher", description="whether more or less of the quantity is better")
    scale: float = Field(1.0, gt=0, description="what the quantity is multiplied by")

    @property
    def factor(self) -> float:
        """What the measured quantity is multiplied by."""
        return self.scale if self.sign == "higher" else -self.scale

    @property
    def required_model(self) -> ModelConfig | None:
        """The model that the judge loads. It is resolved before anything is decoded; its resources are reserved."""
        return None

    @property
    def reads_prompts(self) -> bool:
        """Whether an answer has no sensible score without its prompt."""
        return False

    @property
    def measured_principal(self) -> str | None:
        """The principal whose recorded reward is the score, which makes the judge not independent."""
        return None

    def check(self, context: JudgeContext) -> None:
        """Refuse what cannot work, before anything is decoded and without loading weights.

        Raises:
            ConfigurationError: the model gives no scores.
        """

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        """Everything that decides a score, as plain values; scores of another identity are made again.

        Raises:
            ConfigurationError: a package is not installed.
        """
        return self.model_dump(mode="json")

    @abstractmethod
    def load(self, context: JudgeContext) -> Judge:
        """The judge, ready to score.

        Raises:
            ConfigurationError: its model cannot be loaded, or its package is not installed.
        """


@dataclass(frozen=True, slots=True)
class PerAnswerJudge:
    """A judge that is a function of a single answer.

    Args:
        measure: the measured quantity of one answer; NaN for none.
        factor: what it is multiplied by, `JudgeConfig.factor`.
    """

    measure: Callable[[JudgedAnswer], float]
    factor: float = 1.0

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        return [self.factor * self.measure(answer) + 0.0 for answer in answers]  # -0.0 becomes 0.0


def import_package(kind: str, package: str, module: str) -> ModuleType:
    """The module of an optional package. Raises ConfigurationError, which says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise _not_installed(kind, package) from None


def package_version(kind: str, package: str) -> str:
    """The version of an optional package. Raises ConfigurationError, which says what to install."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise _not_installed(kind, package) from None


def _not_installed(kind: str, package: str) -> ConfigurationError:
    return ConfigurationError(
        f"the {kind} judge needs the package {package}: install cage-align with the extra `evaluate`"
    )
