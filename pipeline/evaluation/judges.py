"""Judges: answers in, a score each; a higher score is always better.

The text judges here need no model. A judge that needs one is in `pipeline.evaluation.reward_models`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.errors import ConfigurationError
from pipeline.evaluation.judge_config import (
    AnyJudge,
    BrevityJudge,
    DistinctJudge,
    LengthJudge,
    PrincipalJudge,
    ProfanityJudge,
    RepetitionJudge,
    RewardModelJudge,
    SentimentJudge,
)
from pipeline.records import Message

WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
CENSOR = "\x00"  # better_profanity writes four of these for a profane word


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge sees: the conversation, the answer's text, and what the run recorded about it."""

    prompt: Sequence[Message]
    text: str
    num_tokens: int = 0
    rewards: Mapping[str, float | None] = field(default_factory=dict)


class Judge(Protocol):
    """Scores answers. NaN where an answer cannot be scored; the score of one does not depend on the others."""

    def score(self, answers: Sequence[Answer]) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """A judge that is a function of one answer."""

    measure: Callable[[Answer], float]
    factor: float = 1.0

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [self.factor * self.measure(answer) for answer in answers]


def is_model_judge(config: AnyJudge) -> bool:
    return isinstance(config, RewardModelJudge)


def text_judge(config: AnyJudge) -> Judge:
    """The judge of a section, of the kinds that need no model.

    Raises:
        ConfigurationError: its package is not installed.
    """
    return Measured(_measure(config), factor_of(config))


def factor_of(config: AnyJudge) -> float:
    """What the measured quantity is multiplied by."""
    return config.scale if config.sign == "higher" else -config.scale


def _measure(config: AnyJudge) -> Callable[[Answer], float]:
    match config:
        case SentimentJudge():
            return _sentiment()
        case ProfanityJudge():
            return _profanity()
        case LengthJudge(unit="tokens"):
            return lambda answer: float(answer.num_tokens)
        case LengthJudge():
            return lambda answer: float(len(words(answer.text)))
        case BrevityJudge(half_words=half_words):
            return lambda answer: brevity(answer.text, half_words)
        case DistinctJudge(n=n):
            return lambda answer: distinct(answer.text, n)
        case RepetitionJudge(n=n):
            return lambda answer: repetition(answer.text, n)
        case PrincipalJudge(principal=name, per=per):
            return lambda answer: own_reward(answer, name, per_token=per == "token")
    raise AssertionError(f"{config.kind} is no text judge")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def brevity(text: str, half_words: float) -> float:
    """1 / (1 + words / half_words); no answer is no short answer and has 0."""
    num_words = len(words(text))
    return 1 / (1 + num_words / half_words) if num_words else 0.0


def distinct(text: str, n: int) -> float:
    """The share of n-grams that are different ones; 1 where there are none."""
    grams = _grams(words(text), n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(text: str, n: int) -> float:
    """The share of words that lie in an n-gram which stood in the text before."""
    all_words = words(text)
    seen: set[tuple[str, ...]] = set()
    repeated: set[int] = set()
    for start, gram in enumerate(_grams(all_words, n)):
        if gram in seen:
            repeated.update(range(start, start + n))
        seen.add(gram)
    return len(repeated) / len(all_words) if all_words else 0.0


def own_reward(answer: Answer, principal: str, *, per_token: bool) -> float:
    """The sum of q over the answer in nats, or its mean; NaN where the record has none."""
    reward = answer.rewards.get(principal)
    if reward is None or (per_token and not answer.num_tokens):
        return math.nan
    return reward / answer.num_tokens if per_token else reward


def _grams(all_words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(all_words[start : start + n]) for start in range(len(all_words) - n + 1)]


def _sentiment() -> Callable[[Answer], float]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise _not_installed("sentiment", "vaderSentiment") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda answer: float(analyzer.polarity_scores(answer.text)["compound"])


def _profanity() -> Callable[[Answer], float]:
    try:
        from better_profanity import Profanity
    except ImportError:
        raise _not_installed("profanity", "better-profanity") from None
    censor: Any = Profanity()

    def share(answer: Answer) -> float:
        num_profane = censor.censor(answer.text.replace(CENSOR, " "), CENSOR).count(CENSOR) / 4
        return float(min(1.0, num_profane / max(1, len(words(answer.text)))))

    return share


def _not_installed(kind: str, package: str) -> ConfigurationError:
    return ConfigurationError(
        f"the {kind} judge needs the package {package}: install cage-align with the extra `evaluate`"
    )
