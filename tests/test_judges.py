"""Judges that need no model: known values, that a higher score is always better, and functions as judges."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import CageError, ConfigurationError
from pipeline.evaluation.judges.function import FunctionJudge
from pipeline.evaluation.judges.interface import JudgeContext, JudgedAnswer, NoScore
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.judges.words import words
from pipeline.evaluation.panel import resolve_panel
from pipeline.evaluation.scores import judge_table

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
        # of other scripts: vowel signs, accents of their own, joiners, and characters that no spaces divide
        ({"kind": "length"}, "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902", 2),
        ({"kind": "length"}, "cafe\u0301s", 1),
        ({"kind": "length"}, "\u0130stanbul'da", 1),
        ({"kind": "length"}, "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", 1),
        ({"kind": "length"}, "\u4eca\u5929 3 GPU\u3002\u597d!", 5),
        ({"kind": "length"}, "\u30ab\u30fb\u3057", 2),
        ({"kind": "distinct", "n": 1}, "\u597d\u597d", 0.5),
        ({"kind": "repetition", "n": 1}, "\u597d\u597d", -0.5),
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
        (lambda answers: ["5"] * len(answers), "judge own failed: TypeError: a score must be a number; got '5'"),
        (lambda answers: "42", "judge own failed: TypeError: it must return a list of numbers; got '42'"),
        (lambda answers: {0: 4.0, 1: 2.0}, "it must return a list of numbers; got {0: 4.0, 1: 2.0}"),
        (lambda answers: {4.0, 2.0}, "it must return a list of numbers"),
        (lambda answers: answers.clear() or [], "judge own failed: AttributeError: 'tuple' object"),
        (lambda answers: sys.exit(0), "judge own failed: SystemExit: 0"),
        (lambda answers: [1 / 0], "judge own failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_must_return_one_number_per_answer(function, message):
    with pytest.raises(CageError, match=message):
        JUDGES.validate_python(function).load(JudgeContext("own")).score([JudgedAnswer([], "x")] * 2)


MODULE = """
from collections.abc import Sequence

WEIGHT = 2.0


def asks(answers):
    return [WEIGHT * answer.text.count("?") for answer in answers]


def picky(answers):
    return [1 / len(answer.text) for answer in answers]


def odd(answers):
    return [float("nan") if "odd" in answer.text else 1.0 for answer in answers]


def slow(answers):
    import time

    time.sleep(5 if "slow" in answers[0].text else 0)
    return [3.0] * len(answers)
"""
TEXTS = [JudgedAnswer([], text) for text in ("why? how?", "", "slow and odd")]


def named(tmp_path, name, **fields):
    path = tmp_path / "own_judges.py"
    path.write_text(MODULE)
    return JUDGES.validate_python({"kind": "function", "function": f"{path}:{name}", **fields})


def test_a_file_names_a_function_in_a_file_or_a_module(tmp_path, monkeypatch):
    config = named(tmp_path, "asks", scale=0.5)
    assert resolve_panel({"own": config}, tmp_path).load()["own"].score(TEXTS) == [2.0, 0.0, 0.0]
    monkeypatch.syspath_prepend(str(tmp_path))
    by_module = JUDGES.validate_python({"kind": "function", "function": "own_judges:asks", "sign": "lower"})
    assert by_module.load(JudgeContext("own")).score(TEXTS) == [-4.0, 0.0, 0.0]
    # what the function uses belongs to its identity
    digest = resolve_panel({"own": config}, tmp_path).digest
    assert resolve_panel({"own": named(tmp_path, "asks", scale=0.5)}, tmp_path).digest == digest
    (tmp_path / "own_judges.py").write_text(MODULE.replace("2.0", "3.0"))
    assert resolve_panel({"own": config}, tmp_path).digest != digest


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module_anywhere:score", "cannot be imported: ModuleNotFoundError"),
        ("/no/such/file.py:score", "there is no file /no/such/file.py"),
        ("math:nothing", "math has no function nothing"),
        ("math:pi", "math has no function pi"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_anything_is_decoded(tmp_path, function, message):
    config = JUDGES.validate_python({"kind": "function", "function": function})
    with pytest.raises(ConfigurationError, match=message):
        resolve_panel({"own": config}, tmp_path)


def test_a_file_that_ends_the_process_is_refused_and_ends_no_run(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import sys\n\n\ndef score(answers):\n    return [1.0] * len(answers)\n\n\nsys.exit(0)\n")
    config = JUDGES.validate_python({"kind": "function", "function": f"{path}:score"})
    with pytest.raises(ConfigurationError, match="cannot be imported: SystemExit: 0"):
        resolve_panel({"own": config}, tmp_path)


@pytest.mark.parametrize("function", ["score", "a b:c", ":x", "x:", 3, None])
def test_what_names_no_function_is_refused(function):
    with pytest.raises(ValidationError, match=r"must be module:function or path/file\.py:function"):
        JUDGES.validate_python({"kind": "function", "function": function})


def test_an_answer_that_fails_or_is_nan_or_slow_has_no_score_and_a_reason(tmp_path):
    def reasons(config):
        found = config.load(JudgeContext("own")).score(TEXTS)
        return [each.reason if math.isnan(each) else float(each) for each in found]

    assert reasons(named(tmp_path, "picky")) == [1 / 9, "ZeroDivisionError: division by zero", 1 / 12]
    assert reasons(named(tmp_path, "odd")) == [1.0, 1.0, "it returned nan"]
    assert reasons(named(tmp_path, "slow", timeout_s=0.2)) == [3.0, 3.0, "it took longer than 0.2 s"]
    assert reasons(named(tmp_path, "picky", timeout_s=5)) == [1 / 9, "ZeroDivisionError: division by zero", 1 / 12]


def test_scores_that_are_missing_are_stored_with_their_reasons_and_counted(tmp_path):
    rows = [
        {"row_id": str(at), "sample": 0, "prompt": [], "response": answer.text, "num_tokens": 3}
        for at, answer in enumerate(TEXTS)
    ]
    judges = {
        "odd": named(tmp_path, "odd").load(JudgeContext("odd")),
        "slow": named(tmp_path, "slow", timeout_s=0.2).load(JudgeContext("slow")),
    }
    table, is_final = judge_table(pa.Table.from_pylist(rows), judges)
    assert table["odd"].to_pylist() == [1.0, 1.0, None]
    assert table["slow"].to_pylist() == [3.0, 3.0, None]
    assert [dict(each) for each in table["_errors"].to_pylist()] == [
        {}, {}, {"odd": "it returned nan", "slow": "it took longer than 0.2 s"},
    ]  # fmt: skip
    assert not is_final
    assert judge_table(pa.Table.from_pylist(rows), {"odd": judges["odd"]})[1]
    assert "_errors" not in judge_table(pa.Table.from_pylist(rows[:2]), judges)[0].column_names


def test_a_missing_score_keeps_its_reason_through_arithmetic_and_processes():
    import pickle

    missing = NoScore("it is late", is_final=False)
    for found in (2.5 * missing, missing - 1.0, 1.0 - missing, missing + 0.0, pickle.loads(pickle.dumps(missing))):
        assert math.isnan(found)
        assert (found.reason, found.is_final) == ("it is late", False)
