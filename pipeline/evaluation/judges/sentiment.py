"""The judge of sentiment, by the word list of vaderSentiment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pipeline.evaluation.judges.interface import (
    Judge,
    JudgeConfig,
    JudgeContext,
    PerAnswerJudge,
    import_package,
    package_version,
)

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource

PACKAGE = "vaderSentiment"


class SentimentJudge(JudgeConfig):
    """VADER's compound sentiment of the text, from -1 to 1."""

    kind: Literal["sentiment"]

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        return {**super().identity(source), "version": package_version(self.kind, PACKAGE)}

    def load(self, context: JudgeContext) -> Judge:
        module = import_package(self.kind, PACKAGE, "vaderSentiment.vaderSentiment")
        analyzer = module.SentimentIntensityAnalyzer()
        return PerAnswerJudge(lambda answer: float(analyzer.polarity_scores(answer.text)["compound"]), self.factor)
