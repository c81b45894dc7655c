"""Judges that count words: length, brevity, distinct n-grams and repetition."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

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

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource

WORD = re.compile(r"\w+(?:['\u2019]\w+)*")  # of ASCII alone; `_any_word` is for all texts
# Chinese and Japanese characters, which no spaces divide into words
KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
JOINERS = "\u200c\u200d"  # within words of Persian and of Indian scripts
COUNTED = "letters with their marks; every Han and kana character"  # what is a word; scores of another one are stale


class WordsJudge(JudgeConfig):
    """A judge that counts words."""

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        return {**super().identity(source), "words": COUNTED}


class LengthJudge(WordsJudge):
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


class BrevityJudge(WordsJudge):
    """1 / (1 + words / half_words): nearly 1 for one word, 1/2 at `half_words`; an empty answer scores 0."""

    kind: Literal["brevity"]
    half_words: float = Field(20.0, gt=0, description="the length in words that scores one half")

    def load(self, context: JudgeContext) -> Judge:
        return PerAnswerJudge(lambda answer: brevity(answer.text, self.half_words), self.factor)


class DistinctJudge(WordsJudge):
    """distinct-n: the number of different n-grams of words over the number of all, from 0 to 1."""

    kind: Literal["distinct"]
    n: int = Field(2, ge=1, le=16, description="words of an n-gram")

    def load(self, context: JudgeContext) -> Judge:
        return PerAnswerJudge(lambda answer: distinct(answer.text, self.n), self.factor)


class RepetitionJudge(WordsJudge):
    """The share of words in an n-gram that occurred earlier in the answer, from 0 to 1."""

    kind: Literal["repetition"]
    n: int = Field(3, ge=1, le=16, description="words of an n-gram")
    sign: Sign = Field("lower", description="whether more or less of the quantity is better")

    def load(self, context: JudgeContext) -> Judge:
        return PerAnswerJudge(lambda answer: repetition(answer.text, self.n), self.factor)


def words(text: str) -> list[str]:
    """The words of a text, in lower case; of Chinese and Japanese its characters."""
    return (WORD if text.isascii() else _any_word()).findall(text.lower())


@cache
def _any_word() -> re.Pattern[str]:
    """A word of any script. Accents and vowel signs that are characters of their own belong to the letter before.

    Python's `\\w` leaves them out, so that a word of Hindi would be several.
    """
    is_mark = [unicodedata.category(chr(code)).startswith("M") for code in range(0x1F000)]
    ends = [code for code in range(1, len(is_mark)) if is_mark[code] != is_mark[code - 1]]
    marks = "".join(f"{chr(first)}-{chr(after - 1)}" for first, after in zip(ends[::2], ends[1::2], strict=True))
    letter = rf"[^\W{KANA}{HAN}]"
    rest = rf"(?:{letter}|[{marks}{JOINERS}])*"
    return re.compile(rf"(?=\w)[{KANA}{HAN}]|{letter}{rest}(?:['\u2019]{letter}{rest})*")


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
