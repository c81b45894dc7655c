"""Judges of the evidence that count letters and marks, so that anybody can measure the same without a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.evaluation.judges.interface import JudgedAnswer

WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)*")
PRONOUNS = "i me my mine myself you your yours yourself we us our ours"
SPOKEN = "okay ok yeah hey hi hello really just so"
PERSONAL = frozenset((PRONOUNS + " " + SPOKEN).split())
LONG = 7  # letters of a long word


def formal(answers: Sequence[JudgedAnswer]) -> list[float]:
    """The share of long words less the share of personal and spoken ones, and of exclamation marks, per word.

    Contractions count as spoken words. From about -1 to 1; an answer without words has no score.
    """
    return [_formal(answer.text) for answer in answers]


def simple(answers: Sequence[JudgedAnswer]) -> list[float]:
    """Minus the mean number of letters of a word; an answer without words has no score."""
    return [-sum(map(len, words)) / len(words) if (words := WORD.findall(a.text)) else float("nan") for a in answers]


def _formal(text: str) -> float:
    words = WORD.findall(text)
    if not words:
        return float("nan")
    num_long = sum(len(word) >= LONG for word in words)
    num_spoken = sum(word.lower() in PERSONAL or "'" in word or "\u2019" in word for word in words)
    return (num_long - num_spoken - text.count("!")) / len(words)
