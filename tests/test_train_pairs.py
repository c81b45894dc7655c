"""Preference data of every shape become comparisons, and what gives none is counted with a reason."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import parse_as
from pipeline.errors import ConfigurationError, RowError
from pipeline.training.comparisons import Drops, read_comparisons
from pipeline.training.data import open_preferences, read_data
from pipeline.training.settings import PairsInputConfig, TrainConfig

ASK = [{"role": "user", "content": "why?"}]
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
BRIEF = {"role": "system", "content": "be brief"}
HH = "\n\nHuman: why?\n\nAssistant: "
HELPSTEER = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}


def written(tmp_path, records):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in records))
    return file


def read(tmp_path, records, **options):
    """(prompt, answers, labels) of every comparison, and what was dropped."""
    path = written(tmp_path, records) if isinstance(records, list) else records
    config = PairsInputConfig(path=str(path), **options)
    found, drops = open_preferences(config), Drops()
    compared = read_comparisons(
        found.records.read(found.layout.columns), found.layout, config, found.objective, drops
    )
    return [
        (list(each.prompt), tuple(answer.text for answer in each.answers), dict(each.labels)) for each in compared
    ], dict(drops.counts)


PAIR = (ASK, ("good", "bad"), {"preferred": 0})
SHAPES = {
    "text after a prompt": ({"prompt": "why?", "chosen": "good", "rejected": "bad"}, {}),
    "messages of the answer": ({"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]}, {}),
    "a message of the answer": ({"prompt": "why?", "chosen": GOOD, "rejected": BAD}, {}),
    "conversations without a prompt": ({"chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]}, {}),
    "conversations beside a prompt": ({"prompt": "why?", "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]}, {}),
    "ShareGPT": (
        {
            "chosen": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "good"}],
            "rejected": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "bad"}],
        },
        {},
    ),
    "messages as JSON text": ({"prompt": json.dumps(ASK), "chosen": json.dumps([GOOD]), "rejected": "bad"}, {}),
    "transcripts": ({"chosen": HH + "good", "rejected": HH + "bad"}, {}),
    "a transcript and two answers": ({"prompt": HH, "chosen": "good", "rejected": "bad"}, {}),
    "other names": ({"q": "why?", "yes": "good", "no": "bad"}, {"prompt": "q", "chosen": "yes", "rejected": "no"}),
    "UltraFeedback, binarized": (
        {"prompt": "why?", "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD], "score_chosen": 9, "score_rejected": 1},
        {},
    ),
    "an answer that looks like JSON": (
        {"prompt": "why?", "chosen": "good", "rejected": "[1, 2]"},
        {"expected": (ASK, ("good", "[1, 2]"), {"preferred": 0})},
    ),
    "a system message": (
        {
            "chosen": [{"role": "system", "content": "be brief"}, *ASK, GOOD],
            "rejected": [{"role": "system", "content": "be brief"}, *ASK, BAD],
        },
        {"expected": ([BRIEF, *ASK], ("good", "bad"), {"preferred": 0})},
    ),
    "a system message in a column of its own": (
        {"system": "be brief", "prompt": "why?", "chosen": "good", "rejected": "bad"},
        {"expected": ([BRIEF, *ASK], ("good", "bad"), {"preferred": 0})},
    ),
    "a system message in a column that is named, and conversations": (
        {"rules": "be brief", "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]},
        {
            "system": "rules",
            "expected": ([BRIEF, *ASK], ("good", "bad"), {"preferred": 0}),
        },
    ),
    "no system message in its column": ({"system": None, "prompt": "why?", "chosen": "good", "rejected": "bad"}, {}),
    "a system message of scored answers": (
        {"system": "be brief", "q": "why?", "answers": [{"text": "good", "s": 2}, {"text": "bad", "s": 1}]},
        {
            "prompt": "q", "answers": "answers", "scores": {"s": "s"},
            "expected": ([BRIEF, *ASK], ("good", "bad"), {"s": 0}),
        },
    ),
    "conversations that hold more than the row's prompt": (
        {"prompt": "why?", "chosen": [*ASK, BAD, *ASK, GOOD], "rejected": [*ASK, BAD, *ASK, BAD]},
        {"expected": ([*ASK, BAD, *ASK], ("good", "bad"), {"preferred": 0})},
    ),
    "objectives by row": (
        {"prompt": "why?", "chosen": "good", "rejected": "bad", "aspect": "kind"},
        {"objectives": "aspect", "expected": (ASK, ("good", "bad"), {"kind": 0})},
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "why?", "response_0": "bad", "response_1": "good", "better_response_id": 1,
            "safer_response_id": 0, "is_response_0_safe": True,
        },
        {"expected": (ASK, ("bad", "good"), {"better": 1, "safer": 0})},
    ),
    "two responses, other names and labels": (
        {"prompt": "why?", "conversation_a": [*ASK, GOOD], "conversation_b": [*ASK, BAD], "winner": "model_b"},
        {
            "responses": ("conversation_a", "conversation_b"), "preferred": {"liked": "winner"},
            "expected": (ASK, ("good", "bad"), {"liked": 1}),
        },
    ),
    "labels by the names of columns": (
        {"prompt": "why?", "x": "good", "y": "bad", "winner": "x"},
        {
            "responses": ("x", "y"), "preferred": {"liked": "winner"},
            "expected": (ASK, ("good", "bad"), {"liked": 0}),
        },
    ),
    "UltraFeedback": (
        {
            "instruction": "why?",
            "completions": [
                {
                    "response": "good", "overall_score": 9.0,
                    "annotations": {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "5"}},
                },
                {
                    "response": "bad", "overall_score": 2.0,
                    "annotations": {"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "N/A"}},
                },
            ],
        },
        {"expected": (ASK, ("good", "bad"), {"helpfulness": 1, "overall": 0})},
    ),
    "answers with ranks, lower is better": (
        {"prompt": "why?", "answers": [{"answer": "good", "rank": 1}, {"answer": "bad", "rank": 2}]},
        {"answers": "answers", "scores": {"liked": "-rank"}, "expected": (ASK, ("good", "bad"), {"liked": 0})},
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read(tmp_path, shape):
    record, options = SHAPES[shape]
    expected = options.get("expected", PAIR)
    found, _ = read(tmp_path, [record], **{key: value for key, value in options.items() if key != "expected"})
    assert found == [expected]


def test_rows_of_one_prompt_with_scores_are_compared(tmp_path):
    rows = [
        {"prompt": "why?", "response": "good", "helpfulness": 4, **HELPSTEER},
        {"prompt": "how?", "response": "alone", "helpfulness": 4, **HELPSTEER},
        {"prompt": "why?", "response": "bad", "helpfulness": 1, **HELPSTEER | {"verbosity": 3}},
    ]
    found, drops = read(tmp_path, rows)
    assert found == [(ASK, ("good", "bad"), {"helpfulness": 0, "verbosity": 1})]
    assert drops["no other answer to its prompt"] == 1
    found, _ = read(tmp_path, rows, scores={"brief": "-verbosity"})
    assert found == [(ASK, ("good", "bad"), {"brief": 0})]


def test_true_is_a_better_score_than_false(tmp_path):
    rows = [{"prompt": ASK, "response": text, "is_safe": text == "good"} for text in ("bad", "good")]
    found, _ = read(tmp_path, rows, scores={"safe": "is_safe"})
    assert found == [(ASK, ("bad", "good"), {"safe": 1})]


def test_turns_of_a_helpsteer_prompt_are_messages(tmp_path):
    prompt = "one\n<extra_id_1>Assistant\ntwo\n<extra_id_1>User\nthree"
    rows = [{"prompt": prompt, "response": text, "helpfulness": at, **HELPSTEER} for at, text in enumerate("ab")]
    [(messages, _, labels)], _ = read(tmp_path, rows)
    assert [each["role"] for each in messages] == ["user", "assistant", "user"]
    assert labels == {"helpfulness": 1}


def test_of_many_answers_the_widest_margins_are_paired_and_the_rest_is_counted(tmp_path):
    answers = [{"text": text, "score": score} for text, score in zip("abcd", (0, 1, 3, 7), strict=True)]
    found, drops = read(
        tmp_path, [{"prompt": "why?", "answers": answers}], answers="answers", scores={"s": "score"},
        max_pairs=3, min_margin=2,
    )  # fmt: skip
    assert [(texts, labels) for _, texts, labels in found] == [
        (("a", "d"), {"s": 1}), (("b", "d"), {"s": 1}), (("c", "d"), {"s": 1}),
    ]  # fmt: skip
    assert drops == {"less than input.min_margin apart for s": 1, "more than input.max_pairs of its prompt": 2}


BAD_PAIRS = {
    "both sides are equal": {"prompt": "why?", "chosen": "same ", "rejected": "same"},
    "a side is missing or empty": {"prompt": "why?", "chosen": "good", "rejected": None},
    "other prompts on the two sides": {"prompt": None, "chosen": [*ASK, GOOD], "rejected": [GOOD, *ASK, BAD]},
    "the prompt is missing or empty": {"prompt": " ", "chosen": "good", "rejected": "bad"},
    "not in the expected form": {"prompt": "why?", "chosen": 7, "rejected": "bad"},
}


@pytest.mark.parametrize("reason", BAD_PAIRS)
def test_a_bad_pair_is_dropped_for_its_reason_and_its_neighbours_stay(tmp_path, reason):
    good = {"prompt": "why?", "chosen": "good", "rejected": "bad"}
    bad = BAD_PAIRS[reason]
    if bad["prompt"] is None:
        del bad["prompt"]
        good = {"chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]}
    found, drops = read(tmp_path, [good, bad, good])
    assert found == [PAIR, PAIR]
    assert drops == {reason: 1}


@pytest.mark.parametrize("other", [[*ASK, BAD], [{"role": "user", "content": "how?"}, BAD]])
def test_a_side_with_a_prompt_must_have_the_rows(tmp_path, other):
    found, drops = read(tmp_path, [{"prompt": "why?", "chosen": "good", "rejected": other}])
    assert (found, drops) == (([PAIR], {}) if other[0] == ASK[0] else ([], {"other prompts on the two sides": 1}))


def test_a_side_that_ends_with_the_user_has_no_answer(tmp_path):
    found, drops = read(tmp_path, [{"chosen": [*ASK, GOOD], "rejected": ASK}])
    assert (found, drops) == ([], {"a side is missing or empty": 1})


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (None, "no label for liked"), ("tie", "no better side (a tie) for liked"),
        (-1, "no better side (a tie) for liked"), (float("nan"), "no label for liked"),
        ("tie (bothbad)", "no better side (a tie) for liked"), ("chosen", "not in the expected form for liked"),
        (True, "not in the expected form for liked"), ("", "no label for liked"),
    ],
)  # fmt: skip
def test_a_label_that_names_no_side_is_dropped_with_its_reason(tmp_path, label, reason):
    rows = [{"prompt": "why?", "x": "good", "y": "bad", "winner": label}]
    found, drops = read(tmp_path, rows, responses=("x", "y"), preferred={"liked": "winner"})
    assert (found, drops) == ([], {reason: 1})


@pytest.mark.parametrize("labels", [[1, 2], [-3, 0, 1], ["0", "2.0"], [0.5]])
def test_numbers_that_are_no_sides_are_refused_whatever_the_other_rows_have(tmp_path, labels):
    rows = [{"prompt": "why?", "x": "good", "y": "bad", "winner": label} for label in labels]
    with pytest.raises(ConfigurationError, match=r"winner must name the better answer by 0 \(x\) or 1 \(y\).*; row "):
        read(tmp_path, rows, responses=("x", "y"), preferred={"liked": "winner"})


@pytest.mark.parametrize(("label", "expected"), [("1.0", 1), (0.0, 0), (" B ", 1), ("Response_A", 0)])
def test_labels_are_read_as_files_write_them(tmp_path, label, expected):
    rows = [{"prompt": "why?", "x": "good", "y": "bad", "winner": label}]
    [(*_, labels)], _ = read(tmp_path, rows, responses=("x", "y"), preferred={"liked": "winner"})
    assert labels == {"liked": expected}


def test_two_system_messages_that_differ_are_counted(tmp_path):
    rows = [{"system": "be long", "chosen": [BRIEF, *ASK, GOOD], "rejected": [BRIEF, *ASK, BAD]}]
    assert read(tmp_path, rows) == ([], {"not in the expected form": 1})


def test_an_objective_without_a_label_leaves_the_others(tmp_path):
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": None}
    found, drops = read(tmp_path, [row])
    assert [labels for *_, labels in found] == [{"better": 1}]
    assert drops == {"no label for safer": 1}


def test_a_score_for_one_answer_only_is_counted(tmp_path):
    rows = [{"prompt": "q", "response": "a", "s": 1.0}, {"prompt": "q", "response": "b", "s": None}]
    found, drops = read(tmp_path, rows, scores={"s": "s"})
    assert (found, drops) == ([], {"a label for one side only for s": 1})


@pytest.mark.parametrize("score", ["nan", "N/A", float("inf"), [1], "1e999"])
def test_a_score_that_is_no_number_is_no_label(tmp_path, score):
    rows = [{"prompt": "q", "response": text, "s": score} for text in "ab"]
    found, drops = read(tmp_path, rows, scores={"s": "s"})
    assert (found, drops) == ([], {"no label for s": 1})


def test_parquet_is_read_as_jsonl_is(tmp_path):
    records = [{"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]}] * 2
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "pairs.parquet")
    assert read(tmp_path, tmp_path / "pairs.parquet") == read(tmp_path, records)


def test_a_line_that_is_not_json_is_counted(tmp_path):
    file = written(tmp_path, [{"prompt": "why?", "chosen": "good", "rejected": "bad"}])
    file.write_text(file.read_text() + "{broken\n")
    assert read(tmp_path, file) == ([PAIR], {"a row that cannot be read": 1})


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["prompt", "text"], {}, "nothing says which answer is better"),
        (["prompt", "chosen"], {"chosen": "chosen", "rejected": "no"}, "no column 'no'; columns: 'prompt', 'chosen'"),
        (["prompt"], {"format": "pku-saferlhf"}, "no column 'response_0', 'response_1'"),
        (["prompt", "a"], {"scores": {"x": "y"}, "response": "a"}, "no column 'y'"),
        (["chosen", "rejected"], {"objectives": "kind"}, "no column 'kind'"),
        (["prompt", "a", "b"], {"responses": ("a", "b")}, "responses need preferred"),
        (["prompt", "chosen", "rejected"], {"min_margin": 0.5}, "input.min_margin has no effect"),
        (["prompt", "a", "b", "c"], {"responses": ("a", "b"), "preferred": {"x": "c"}, "max_pairs": 1}, "no effect"),
    ],
)
def test_missing_columns_and_settings_without_effect_are_named(tmp_path, columns, options, message):
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path, [dict.fromkeys(columns, "x")], **options)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"input": {"path": "x", "chosen": "c"}}, "name both chosen and rejected"),
        ({"input": {"path": "x", "chosen": "c", "rejected": "r", "scores": {"a": "b"}}}, "of one shape"),
        ({"input": {"path": "x", "scores": {"../up": "b"}}}, "an objective's name"),
        ({"training": {"loss": "rlhf"}}, "training.loss"),
        ({"training": {"loss": "dpo", "length_normalization": True}}, "no effect with loss: dpo"),
        ({"cluster": {"address": "auto"}}, "address has no effect with transport: local"),
        ({"training": {"epoch": 1}}, "did you mean epochs"),
        ({"output": {"path": "x", "rows_per_shard": 3}}, "not a known key"),
    ],
)
def test_a_wrong_configuration_is_one_line(section, message):
    tree = {"input": {"path": "x"}, "output": {"path": "y"}} | section
    with pytest.raises(ConfigurationError, match=message):
        parse_as(TrainConfig, tree)


def train_config(path, **training):
    return TrainConfig.model_validate(
        {"input": {"path": str(path)}, "output": {"path": "unused"}, "training": training}
    )


def encode(prompt, answers):
    """One token a character; text with a question mark in it cannot be read."""
    if any("?" in text for text in answers):
        raise RowError("a question mark")
    return [ord(char) for char in prompt[-1]["content"]], [[ord(char) for char in text] for text in answers]


def rows_of(num_prompts, each=2):
    return [
        {"prompt": f"ask {at}", "chosen": f"good {number}", "rejected": "bad"}
        for at in range(num_prompts)
        for number in range(each)
    ]


def test_prompts_are_held_out_whole_and_the_same_ones_every_time(tmp_path):
    config = train_config(written(tmp_path, rows_of(40)), validation=0.2)
    first, second = (read_data(open_preferences(config.input), config, encode) for _ in range(2))
    sides = [{pair.comparison.prompt[0]["content"] for pair in part} for part in (first.train, first.held_out)]
    assert len(sides[0]) == 32
    assert len(sides[1]) == 8
    assert not sides[0] & sides[1]
    assert first == second
    other = config.model_copy(update={"training": config.training.model_copy(update={"seed": 1})})
    assert read_data(open_preferences(other.input), other, encode).held_out != first.held_out


def test_a_prompt_with_blanks_around_it_is_on_the_side_of_the_one_without(tmp_path):
    rows = rows_of(20, each=1)
    rows += [{**row, "prompt": f" {row['prompt']}\n", "rejected": "worse"} for row in rows]
    config = train_config(written(tmp_path, rows), validation=0.3)
    data = read_data(open_preferences(config.input), config, encode)
    sides = [{pair.comparison.prompt[0]["content"].strip() for pair in part} for part in (data.train, data.held_out)]
    assert [len(side) for side in sides] == [14, 6]
    assert not sides[0] & sides[1]


def test_what_the_model_cannot_read_or_hold_is_counted(tmp_path):
    rows = [
        *rows_of(4),
        {"prompt": "a", "chosen": "x?", "rejected": "y"},
        {"prompt": "a", "chosen": "x" * 99, "rejected": "y"},
    ]
    config = train_config(written(tmp_path, rows), max_length=50)
    found = read_data(open_preferences(config.input), config, encode)
    assert dict(found.drops.counts) == {
        "the model cannot read it": 1,
        "longer than training.max_length, 50 tokens": 1,
    }


@pytest.mark.parametrize(
    ("rows", "training", "message"),
    [
        ([{"prompt": "q", "chosen": "x", "rejected": "x"}], {}, "no pair is left of 1 rows: 1 dropped: both sides"),
        (rows_of(1), {}, "all 2 pairs of preferred are held out, because they have one prompt"),
        (rows_of(3), {"objectives": "kind"}, "the data have no objective kind; they have preferred"),
        (rows_of(3), {"max_length": 8}, "no pair is left for preferred: 6 dropped: longer than"),
    ],
)
def test_nothing_to_train_on_is_an_error_with_the_reasons(tmp_path, rows, training, message):
    config = train_config(written(tmp_path, rows), **training)
    with pytest.raises(ConfigurationError, match=message):
        read_data(open_preferences(config.input), config, encode)


def test_answers_that_repeat_their_prompts_are_noted(tmp_path):
    rows = [{"prompt": f"ask {at}", "chosen": f"ask {at} good", "rejected": f"ask {at} bad"} for at in range(20)]
    config = train_config(written(tmp_path, rows))
    [note] = read_data(open_preferences(config.input), config, encode).notes
    assert note.startswith("both answers of 20 of 20 pairs begin with their prompt")
    config = train_config(written(tmp_path, rows_of(20)))
    assert not read_data(open_preferences(config.input), config, encode).notes


def test_labels_that_never_differ_are_noted(tmp_path):
    rows = [
        {
            "prompt": f"q{at}",
            "response_0": "a",
            "response_1": "b",
            "better_response_id": 0,
            "safer_response_id": at % 2,
        }
        for at in range(30)
    ]
    config = train_config(written(tmp_path, rows))
    [note] = read_data(open_preferences(config.input), config, encode).notes
    assert note.startswith("better_response_id names response_0 in all 30 rows")


def test_a_run_of_synthesize_is_read_with_its_judge_and_its_split(tmp_path):
    folder = tmp_path / "run" / "_dataset" / "preferences"
    folder.mkdir(parents=True)
    (folder.parent / "manifest.json").write_text(json.dumps({"source": {"synthesis.score": "tone"}, "files": []}))
    for split, prompts in (("train", range(6)), ("validation", range(6, 8))):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"ask {at}"}], "chosen": [GOOD], "rejected": [BAD],
                "score_chosen": 0.9, "score_rejected": 0.1,
            }
            for at in prompts
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    for path in (tmp_path / "run", tmp_path / "run" / "_dataset"):
        config = train_config(path)
        found = read_data(open_preferences(config.input), config, encode)
        assert found.objectives == ("tone",)
        assert {pair.comparison.prompt[0]["content"] for pair in found.held_out} == {"ask 6", "ask 7"}
        assert len(found.train) == 6
        assert [answer.scores for answer in found.train[0].comparison.answers] == [{"tone": 0.9}, {"tone": 0.1}]


def test_ratings_of_both_sides_are_returns(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": "4", "rejected-rating": None}]
    config = train_config(written(tmp_path, rows))
    found = open_preferences(config.input)
    [compared] = read_comparisons(
        found.records.read(found.layout.columns), found.layout, config.input, found.objective, Drops()
    )
    assert [answer.scores for answer in compared.answers] == [{"preferred": 4.0}, {}]


def test_a_system_message_that_the_first_rows_lack_is_read(tmp_path):
    pair = {"prompt": "why?", "chosen": "good", "rejected": "bad"}
    found, _ = read(tmp_path, [pair] * 100 + [{**pair, "system": "be brief"}])
    assert [found[99][0], found[100][0]] == [ASK, [BRIEF, *ASK]]
