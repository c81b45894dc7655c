"""Judges that need no model: known values, and that a higher score is always better."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter

from pipeline.evaluation.judges.interface import JudgeContext, JudgedAnswer
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.judges.words import words

JUDGES = TypeAdapter(AnyJudge)


def judge(**section):
    return JUDGES.validate_python(section).load(JudgeContext("tested"))


def score(text: str, *, num_tokens: int = 7, rewards=None, **section) -> float:
    [found] = judge(**section).score(
        [JudgedAnswer([{"role": "user", "content": "?"}], text, num_tokens, rewards or {})]
    )
    return found


def test_sentiment_prefers_the_friendly_answer():
    kind = {"kind": "sentiment"}
    assert score("I love it, wonderful!", **kind) > 0.8 > 0 > score("I hate it, horrible.", **kind)
    assert score("", **kind) == 0
    assert score("I hate it.", sign="lower", scale=2, **kind) == -2 * score("I hate it.", **kind) > 0


def test_profanity_counts_profane_words_and_no_others():
    assert score("What a damn fool", kind="profanity") == -1 / 4
    assert score("The assessment of Scunthorpe's classic cocktails", kind="profanity") == 0
    assert score("\x00\x00\x00\x00", kind="profanity") == 0
    assert score("damn " * 5, kind="profanity", sign="higher", scale=10) == 10


@pytest.mark.parametrize(
    ("section", "text", "expected"),
    [
        ({"kind": "length"}, "Don't stop, I'm here!", 4),
        ({"kind": "length"}, "Grüße, c'est l\u2019été", 3),
        ({"kind": "length", "unit": "tokens", "sign": "lower"}, "whatever", -7),
        ({"kind": "brevity", "half_words": 3}, "one two three", 0.5),
        ({"kind": "brevity", "half_words": 3}, "one", 0.75),
        ({"kind": "brevity"}, " ... ", 0),
        ({"kind": "distinct", "n": 1}, "a b A b", 0.5),
        ({"kind": "distinct"}, "a b a b", 2 / 3),
        ({"kind": "distinct"}, "one", 1),
        ({"kind": "repetition"}, "a b c d a b c", -3 / 7),
        ({"kind": "repetition", "n": 2}, "x x x x x", -4 / 5),
        ({"kind": "repetition"}, "", 0),
    ],
)
def test_known_values(section, text, expected):
    assert score(text, **section) == pytest.approx(expected)


def test_a_principal_judges_by_its_own_reward():
    section = {"kind": "principal", "principal": "kind"}
    assert score("x", num_tokens=4, rewards={"kind": 6.0}, **section) == 1.5
    assert score("x", num_tokens=4, rewards={"kind": 6.0}, per="answer", sign="lower", **section) == -6.0
    assert math.isnan(score("x", rewards={"kind": None}, **section))
    assert math.isnan(score("x", num_tokens=0, rewards={"kind": 0.0}, **section))


def test_scores_come_in_the_order_of_the_answers():
    texts = ["a", "a b c", "", "a b"]
    assert judge(kind="length").score([JudgedAnswer([], text) for text in texts]) == [1, 3, 0, 2]
    assert [len(words(text)) for text in texts] == [1, 3, 0, 2]
