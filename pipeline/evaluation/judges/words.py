"""Judges that count words: length, brevity, distinct n-grams and repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline.evaluation.judges.interface import (
    Judge,
    JudgeConfig,
    JudgeContext,
    JudgedAnswer,
    NoScore,
    PerAnswerJudge,
    Sign,
)

WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


class LengthJudge(JudgeConfig):
    """The number of words, or of sampled tokens."""

    kind: Literal["length"]
    unit: Literal["words", "tokens"] = Field("words", description="in which length is counted")

    def load(self, context: JudgeContext) -> Judge:
        if self.unit == "tokens":
            return PerAnswerJudge(_num_tokens, self.factor)
        return PerAnswerJudge(lambda answer: float(len(words(answer.text))), self.factor)


def _num_tokens(answer: JudgedAnswer) -> float:
    if answer.text and not answer.num_tokens:
        return NoScore("it does not say how many tokens it has (num_tokens)")
    return float(answer.num_tokens)


class BrevityJudge(JudgeConfig):
    """1 / (1 + words / half_words): nearly 1 for one word, 1/2 at `half_words`; an empty answer scores 0."""

    kind: Literal["brevity"]
    half_words: float = Field(20.0, gt=0, description="the length in words that scores one half")

    def load(self, context: JudgeContext) -> Judge:
        return PerAnswerJudge(lambda answer: brevity(answer.text, self.half_words), self.factor)


class DistinctJudge(JudgeConfig):
    """distinct-n: the number of different n-grams of words over the number of all, from 0 to 1."""

    kind: Literal["distinct"]
    n: int = Field(2, ge=1, le=16, description="words of an n-gram")

    def load(self, context: JudgeContext) -> Judge:
        return PerAnswerJudge(lambda answer: distinct(answer.text, self.n), self.factor)


class RepetitionJudge(JudgeConfig):
    """The share of words in an n-gram that occurred earlier in the answer, from 0 to 1."""

    kind: Literal["repetition"]
    n: int = Field(3, ge=1, le=16, description="words of an n-gram")
    sign: Sign = Field("lower", description="whether more or less of the quantity is better")

    def load(self, context: JudgeContext) -> Judge:
        return PerAnswerJudge(lambda answer: repetition(answer.text, self.n), self.factor)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def brevity(text: str, half_words: float) -> float:
    """1 / (1 + words / half_words). An empty answer is no short answer: it scores 0."""
    num_words = len(words(text))
    return 1 / (1 + num_words / half_words) if num_words else 0.0


def distinct(text: str, n: int) -> float:
    """The number of different n-grams over the number of all; 1 where there are none."""
    grams = _grams(words(text), n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(text: str, n: int) -> float:
    """The share of words in an n-gram that occurred earlier in the text."""
    all_words = words(text)
    seen: set[tuple[str, ...]] = set()
    repeated: set[int] = set()
    for start, gram in enumerate(_grams(all_words, n)):
        if gram in seen:
            repeated.update(range(start, start + n))  # a word in two repeated n-grams counts once
        seen.add(gram)
    return len(repeated) / len(all_words) if all_words else 0.0


def _grams(all_words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(all_words[start : start + n]) for start in range(len(all_words) - n + 1)]
