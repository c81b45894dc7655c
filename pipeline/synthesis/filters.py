"""Filters: what an answer must satisfy to become training data. The first one that it fails is the reason given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.evaluation.judges.words import repetition
from pipeline.synthesis.candidates import Candidate, as_number
from pipeline.synthesis.settings import FiltersConfig, SynthesisConfig

REPETITION_WORDS = 3
EMPTY, NO_SCORE = "empty", "no score"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an answer was dropped.

    Args:
        reason: the setting that it fails.
        value: what was measured; None where it has no value.
        is_weak: whether it is a complete answer with a low score, which may be the rejected side of a pair.
    """

    reason: str
    value: float | None = None
    is_weak: bool = False


class Filters:
    """The filters of single answers: first those of form (length, repetition), then those of quality (scores)."""

    def __init__(self, settings: SynthesisConfig) -> None:
        self._settings = settings
        self._quality = list(_quality_checks(settings))

    def check(self, candidate: Candidate) -> Failure | None:
        """The first filter that the answer fails; None when it passes all."""
        failure = _check_form(candidate, self._settings.filters)
        if failure is not None:
            return failure
        for reason, measure, least, most in self._quality:
            value = measure(candidate)
            if not least <= value <= most:  # NaN is in no range
                return Failure(reason, None if math.isnan(value) else value, is_weak=True)
        return None


def _check_form(candidate: Candidate, filters: FiltersConfig) -> Failure | None:
    if candidate.finish_reason not in filters.finish_reasons:
        return Failure("filters.finish_reasons")
    if not candidate.text.strip():
        return Failure(EMPTY)
    if candidate.num_tokens < filters.min_tokens:
        return Failure("filters.min_tokens", candidate.num_tokens)
    if filters.max_tokens is not None and candidate.num_tokens > filters.max_tokens:
        return Failure("filters.max_tokens", candidate.num_tokens)
    if filters.max_repetition is not None:
        share = repetition(candidate.text, REPETITION_WORDS)
        if share > filters.max_repetition:
            return Failure("filters.max_repetition", share)
    return None


Check = tuple[str, Callable[[Candidate], float], float, float]


def _quality_checks(settings: SynthesisConfig) -> Iterator[Check]:
    """Yield reason, measure, and the range in which the measured value must lie."""
    filters = settings.filters
    for name, least in filters.min_rewards.items():
        yield f"filters.min_rewards.{name}", _reward(name), least, math.inf
    for name, least in filters.min_rewards_per_token.items():
        yield f"filters.min_rewards_per_token.{name}", _reward_per_token(name), least, math.inf
    for name, judged in filters.judges.items():
        least = -math.inf if judged.min is None else judged.min
        yield f"filters.judges.{name}", _judged(name), least, math.inf if judged.max is None else judged.max
    if settings.is_ranked:
        yield NO_SCORE, lambda candidate: candidate.score(settings.score), -math.inf, math.inf


def _reward(name: str) -> Callable[[Candidate], float]:
    return lambda candidate: as_number(candidate.rewards[name])


def _reward_per_token(name: str) -> Callable[[Candidate], float]:
    return lambda candidate: as_number(candidate.rewards[name]) / max(1, candidate.num_tokens)


def _judged(name: str) -> Callable[[Candidate], float]:
    return lambda candidate: candidate.judged[name]
