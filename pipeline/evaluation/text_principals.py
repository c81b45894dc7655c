"""Principals that are judges: their sections checked, their models found, and what scores texts in a replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.files import parse_as
from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.interface import Judge, JudgedAnswer, JudgeFailed, NoScore
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.panel import Panel, resolve_panel
from pipeline.records import Message
from pipeline.sections import Section


class _Named(Section):
    judge: AnyJudge


class _Principals(Section):
    principals: dict[str, _Named]


@dataclass(frozen=True, slots=True)
class JudgePrincipals:
    """The judges that are principals of a run. Picklable: each replica calls `load`.

    Args:
        panel: the judges, by the principal's name.
        scales: nats that one point of each judge's score is worth.
    """

    panel: Panel
    scales: Mapping[str, float]

    def identities(self) -> dict[str, str]:
        """What decides each judge's scores, by the judge's place in the configuration."""
        return {f"principals.{name}.judge": self.panel.digest for name in self.scales}

    def load(self) -> Mapping[str, TextScorer]:
        """What scores texts, by the principal's name. Raises ConfigurationError where a model cannot be loaded."""
        judges = self.panel.load()
        return {name: TextScorer(judges[name], scale) for name, scale in self.scales.items()}


@dataclass(frozen=True, slots=True)
class TextScorer:
    """A judge's scores in nats.

    Args:
        judge: it is loaded.
        scale: nats per point.
    """

    judge: Judge
    scale: float

    def __call__(self, prompt: Sequence[Message], texts: Sequence[str], num_tokens: Sequence[int]) -> list[float]:
        """The score of each text as an answer to the prompt; NaN where there is none."""
        answers = [JudgedAnswer(prompt, text, count) for text, count in zip(texts, num_tokens, strict=True)]
        try:
            return [self.scale * score for score in self.judge.score(answers)]
        except JudgeFailed as error:  # of one row: others may have scores
            return [NoScore(str(error))] * len(answers)


def resolve_judge_principals(
    config: Config, cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None
) -> JudgePrincipals | None:
    """The judges among the principals, with their models found; None where there are none.

    Raises:
        ConfigurationError: a judge's section cannot be used, or its model or package is missing.
    """
    judged = {name: each.judged_by for name, each in config.principals.items()}
    sections = {name: by for name, by in judged.items() if by is not None}
    if not sections:
        return None
    tree = {"principals": {name: {"judge": dict(section)} for name, (section, _) in sections.items()}}
    judges = {name: each.judge for name, each in parse_as(_Principals, tree).principals.items()}
    for name, judge in judges.items():
        if judge.measured_principal is not None:
            raise ConfigurationError(f"principals.{name}.judge: a judge of kind principal cannot be a principal")
    panel = resolve_panel(judges, cache_folder, progress=progress)
    return JudgePrincipals(panel, {name: scale for name, (_, scale) in sections.items()})
