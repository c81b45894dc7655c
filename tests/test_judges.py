"""Judges that need no model: known values, that a higher score is always better, and functions as judges."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import CageError, ConfigurationError
from pipeline.evaluation.judges.function import FunctionJudge
from pipeline.evaluation.judges.interface import JudgeContext, JudgedAnswer
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.judges.words import words
from pipeline.evaluation.panel import resolve_panel

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


def questions(answers):
    return [answer.text.count("?") for answer in answers]


def digest_of(section) -> str:
    return resolve_panel({"own": JUDGES.validate_python(section)}, Path()).digest


def test_a_function_is_a_judge():
    answers = [JudgedAnswer([], text) for text in ("What? Who?", "No.", "Why?")]
    assert JUDGES.validate_python(questions).load(JudgeContext("own")).score(answers) == [2, 0, 1]
    turned = FunctionJudge(function=questions, sign="lower", scale=10)
    assert JUDGES.validate_python(turned).load(JudgeContext("own")).score(answers) == [-20, 0, -10]
    assert turned.model_dump(mode="json")["function"].endswith("test_judges:questions")


def test_a_function_judges_again_when_its_text_or_its_version_changes():
    def count(answers):
        return [0.0 for _ in answers]

    first = digest_of(FunctionJudge(function=count))
    assert digest_of(count) == first
    assert digest_of(FunctionJudge(function=count, version="2")) != first

    def count(answers):
        return [1.0 for _ in answers]

    assert digest_of(count) != first


def test_a_function_without_source_text_needs_a_version():
    with pytest.raises(ConfigurationError, match=r"builtins:len has no source text.*give FunctionJudge a version"):
        digest_of(len)
    assert digest_of(FunctionJudge(function=len, version="1")) != digest_of(FunctionJudge(function=len, version="2"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda answers: [1.0], "judge own must return one score per answer: 2; got 1"),
        (lambda answers: ["many"] * len(answers), "judge own failed: ValueError: could not convert"),
        (lambda answers: [1 / 0], "judge own failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_must_return_one_number_per_answer(function, message):
    with pytest.raises(CageError, match=message):
        JUDGES.validate_python(function).load(JudgeContext("own")).score([JudgedAnswer([], "x")] * 2)


def test_a_file_cannot_name_a_function():
    with pytest.raises(ValidationError, match="must be a Python function"):
        JUDGES.validate_python({"kind": "function", "function": "os:system"})
