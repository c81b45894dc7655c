"""`cage compare`: pairing, intervals, adjusted p values, power, and files of other systems."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats
from support.commands import cage

from pipeline.errors import ConfigurationError
from pipeline.evaluation.compare import compare, score_systems
from pipeline.evaluation.config import BootstrapConfig
from pipeline.evaluation.judges.interface import JudgeContext, PerAnswerJudge
from pipeline.evaluation.judges.words import LengthJudge
from pipeline.evaluation.significance import holm, prompts_for, smallest_difference
from pipeline.evaluation.systems import read_systems

LENGTH = {"words": PerAnswerJudge(lambda answer: float(len(answer.text.split())))}


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(folder, name, counts, **fields):
    rows = [{"id": f"p{at}", "response": "w " * count, **fields} for at, count in enumerate(counts)]
    return write(folder, name, rows)


def found(paths, **bootstrap):
    return compare(score_systems(read_systems(paths), LENGTH), BootstrapConfig(**bootstrap))


def test_a_difference_is_paired_by_prompt(tmp_path):
    """One word more on every prompt, however different the prompts are, is certain."""
    counts = list(range(1, 41))
    paths = [words(tmp_path, "a.jsonl", counts), words(tmp_path, "b.jsonl", [each + 1 for each in counts])]
    result = found(paths)
    (difference,) = result["differences"]
    assert difference["difference"] == pytest.approx(1.0)
    assert difference["interval"] == pytest.approx([1.0, 1.0])
    assert (difference["wins"], difference["ties"], difference["losses"]) == (40, 0, 0)
    assert difference["p"] == pytest.approx(2.0**-39)
    low, high = result["systems"][0]["scores"]["words"]["interval"]
    assert high - low > 5


def test_one_prompt_shows_no_difference(tmp_path):
    """Every resampling of it is the same, which says nothing about others."""
    paths = [words(tmp_path, "a.jsonl", [3]), words(tmp_path, "b.jsonl", [7])]
    (difference,) = found(paths)["differences"]
    assert difference["difference"] == 4
    assert (difference["p"], difference["p_adjusted"], difference["prompts_for_this_difference"]) == (None,) * 3


def test_the_interval_covers_the_true_difference_as_often_as_it_says(tmp_path):
    generator, hits = np.random.default_rng(1), 0
    for at in range(60):
        ours, theirs = generator.poisson(20, 40), generator.poisson(20, 40)
        paths = [words(tmp_path, f"a{at}.jsonl", ours), words(tmp_path, f"b{at}.jsonl", theirs)]
        low, high = found(paths, samples=300, confidence=0.9, seed=at)["differences"][0]["interval"]
        hits += low <= 0 <= high
    assert 46 <= hits <= 60  # 54 are expected


def test_samples_of_a_prompt_are_no_prompts_of_their_own(tmp_path):
    """Four copies of each answer say no more than one; samples that differ widen the interval."""
    counts = [3, 9, 4, 12, 7, 8]
    once = words(tmp_path, "once.jsonl", counts)
    rows = [
        {"id": f"p{at}", "response": "w " * n, "sample": sample} for at, n in enumerate(counts) for sample in range(4)
    ]
    other = words(tmp_path, "other.jsonl", [5] * 6)
    copies = found([other, write(tmp_path, "copies.jsonl", rows)])["differences"][0]
    assert copies["interval"] == pytest.approx(found([other, once])["differences"][0]["interval"])
    spread = [{**row, "response": "w " * (len(row["response"]) // 2 + 6 * (row["sample"] % 2))} for row in rows]
    wide = found([other, write(tmp_path, "spread.jsonl", spread)])["differences"][0]
    assert wide["interval"][1] - wide["interval"][0] > 1.02 * (copies["interval"][1] - copies["interval"][0])


def test_only_prompts_that_all_systems_answered_are_compared(tmp_path):
    paths = [
        words(tmp_path, "a.jsonl", [1, 2, 3]),
        words(tmp_path, "b.jsonl", [1, 2]),
        words(tmp_path, "c.jsonl", [5]),
    ]
    result = found(paths)
    assert result["num_prompts"] == 1
    assert result["num_prompts_left_out"] == 2
    assert [entry["scores"]["words"]["mean"] for entry in result["systems"]] == [1.0, 1.0, 5.0]


def test_prompts_that_are_there_twice_are_counted(tmp_path):
    rows = [{"id": at, "prompt": f"prompt {at // 2}", "response": "w"} for at in range(6)]
    paths = [write(tmp_path, "a.jsonl", rows), write(tmp_path, "b.jsonl", rows)]
    assert found(paths)["num_prompts_repeated"] == 3
    done = cage("compare", *paths)
    assert "3 prompts are equal to another one with another id" in " ".join(done.stdout.split())
    assert (
        found([words(tmp_path, "c.jsonl", [1, 2]), words(tmp_path, "d.jsonl", [1, 2])])["num_prompts_repeated"] == 0
    )


def test_texts_that_no_user_would_read_are_counted(tmp_path):
    texts = ["so", " \n", "<think>hm</think>so", "so<|im_end|>", "a < b | c > d"]
    rows = [{"id": at, "response": text} for at, text in enumerate(texts)]
    path = write(tmp_path, "a.jsonl", rows)
    other = write(tmp_path, "b.jsonl", [{"id": at, "response": "so"} for at in range(5)])
    empty, marked = found([path, other])["notes"]
    assert empty.startswith("1 answer of a.jsonl: no text")
    assert marked.startswith("2 answers of a.jsonl: what looks like a chat template's tokens or reasoning")
    assert "'<think>'" in marked
    assert found([other, write(tmp_path, "c.jsonl", rows[:1])])["notes"] == []


def test_small_scores_are_compared_as_large_ones(tmp_path):
    counts = np.random.default_rng(0).integers(1, 9, (2, 20)).tolist()
    systems = read_systems([words(tmp_path, "a.jsonl", counts[0]), words(tmp_path, "b.jsonl", counts[1])])
    results = []
    for scale in (1.0, 1e-15):
        judge = {"words": PerAnswerJudge(lambda answer: float(len(answer.text.split())), scale)}
        [row] = compare(score_systems(systems, judge), BootstrapConfig())["differences"]
        results.append([row[key] for key in ("p", "wins", "ties", "losses")])
    assert results[0] == pytest.approx(results[1])


def test_holm_adjusts_as_published():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.5, 0.9]) == [None, 1.0, 1.0]


def test_the_number_of_prompts_finds_the_difference_four_times_in_five():
    generator = np.random.default_rng(0)
    for lead in (0.25, 0.5, 1.0, 1.3):  # in deviations
        number = prompts_for(2 * lead, 2.0)
        assert number is not None
        leads = generator.normal(2 * lead, 2.0, size=(2000, number))
        t = abs(leads.mean(1)) / (leads.std(1, ddof=1) / math.sqrt(number))
        assert (t > stats.t.ppf(0.975, number - 1)).mean() == pytest.approx(0.8, abs=0.04)
        assert smallest_difference(2.0, number) == pytest.approx(2 * lead, rel=0.1)
    assert prompts_for(0.0, 1.0) is None


def test_many_comparisons_do_not_hide_a_lead_on_every_prompt(tmp_path):
    """A p value that the number of bootstrap samples bounds cannot be adjusted for 60 comparisons."""
    counts = list(range(1, 31))
    same = [words(tmp_path, f"same{at}.jsonl", counts) for at in range(59)]
    other = words(tmp_path, "other.jsonl", [each + 1 + each % 2 for each in counts])
    result = found([*same, other, words(tmp_path, "last.jsonl", counts)], samples=100)
    by_name = {each["system"]: each for each in result["differences"]}
    assert by_name["other.jsonl"]["p_adjusted"] < 1e-6
    assert by_name["last.jsonl"]["p_adjusted"] == 1


def test_all_means_are_of_the_prompts_that_have_a_score_of_every_system(tmp_path):
    """Otherwise the one system that a judge could not judge on a hard prompt would look better."""
    judge = {"words": PerAnswerJudge(lambda answer: float(len(answer.text.split()) or "nan"))}
    paths = [words(tmp_path, "a.jsonl", [1, 2, 9]), words(tmp_path, "b.jsonl", [1, 2, 0])]
    result = compare(score_systems(read_systems(paths), judge), BootstrapConfig(samples=100))
    assert [entry["scores"]["words"]["mean"] for entry in result["systems"]] == [1.5, 1.5]
    assert result["num_prompts_by_judge"] == {"words": 2}
    assert result["differences"][0]["difference"] == 0


def test_judges_read_the_same_prompt_of_all_systems(tmp_path):
    seen = []

    class Recorder:
        def score(self, answers):
            seen.append([[message["content"] for message in answer.prompt] for answer in answers])
            return [0.0] * len(answers)

    paths = [words(tmp_path, "a.jsonl", [1, 2], prompt="hello"), words(tmp_path, "b.jsonl", [1, 2])]
    score_systems(read_systems(paths), {"recorder": Recorder()}, prompt_readers=["recorder"])
    assert seen == [[["hello"], ["hello"]]] * 2
    systems = read_systems([paths[1], words(tmp_path, "c.jsonl", [1, 2])])
    with pytest.raises(ConfigurationError, match="recorder reads prompts, and no system says that of 'p0'"):
        score_systems(systems, {"recorder": Recorder()}, prompt_readers=["recorder"])


def test_answers_are_read_as_other_systems_write_them(tmp_path):
    rows = [
        {"prompt_id": 7, "prompt": "hello", "output": "a b"},
        {
            "row_id": "8",
            "messages": [],
            "completion": [{"role": "assistant", "content": "c"}],
            "finish_reason": "length",
        },
    ]
    (system,) = read_systems([write(tmp_path, "x.jsonl", rows)])
    assert [answer.row_id for answer in system.answers] == ["7", "8"]
    assert [answer.judged.text for answer in system.answers] == ["a b", "c"]
    assert [answer.was_cut for answer in system.answers] == [None, True]


def test_prompts_and_answers_in_parts_are_read_as_runs_store_them(tmp_path):
    """Otherwise a judge that reads prompts would read the list as Python writes it."""
    asked, said = ([{"type": "text", "text": text}] for text in ("why?", "so"))
    rows = [
        {"id": 1, "prompt": [{"role": "user", "content": asked}], "output": [{"role": "assistant", "content": said}]},
        {"id": 2, "prompt": [{"from": "human", "value": "why?"}], "output": "so"},
    ]
    (system,) = read_systems([write(tmp_path, "x.jsonl", rows)])
    assert [answer.judged.prompt for answer in system.answers] == [({"role": "user", "content": "why?"},)] * 2
    assert [answer.judged.text for answer in system.answers] == ["so", "so"]
    for wrong, why in (({"role": "user"}, r"prompt\[0\]\.content must be text"), ({"content": "x"}, "role must be")):
        path = write(tmp_path, "y.jsonl", [{"id": 1, "prompt": [wrong], "output": "so"}])
        with pytest.raises(ConfigurationError, match=f"line 1: .*{why}"):
            read_systems([path])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no answers"),
        ([{"id": "a"}], "line 1: there is none of the fields response, answer"),
        ([{"response": "x"}], "none of the fields row_id, id, prompt_id"),
        ([{"id": "a", "response": 3}], "the answer must be a text; got 3"),
        ([{"id": "a", "response": "x"}] * 2, "two answers to 'a' with sample 0"),
        ([{"id": "a", "response": "x", "sample": -1}], "sample must be a number from 0 to 1023; got -1"),
        ([{"id": "a", "response": "x", "sample": True}], "sample must be a number from 0 to 1023; got True"),
        ([{"id": "a", "response": "x", "sample": 10**9}], "sample must be a number from 0 to 1023"),
        ([["a"]], "each line must be an object"),
        ([{"id": "a", "response": ["x", "y"]}], "take a line each, with a field sample"),
        ([{"id": "a", "response": [{"role": "user", "content": "x"}]}], "messages that end with the assistant's"),
        ([{"id": "a", "answer": "gold", "output": "x"}], "the fields answer, output differ; keep the one"),
        ([{"id": 1, "prompt_id": "a", "output": "x"}], "the fields id, prompt_id differ"),
        ([{"id": True, "output": "x"}], "the id must be a text or a number; got True"),
        ([{"id": "a", "output": "x", "num_tokens": "7"}], "num_tokens must be a whole number; got '7'"),
        ([{"id": "a", "output": "cut \ud83d"}], r"line 1: a text has half of a character \(a lone surrogate\)"),
        ([{"id": "a", "output": "x", "finish_reason": "done"}], "finish_reason must be one of stop, .*; got 'done'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, rows, said):
    with pytest.raises(ConfigurationError, match=said):
        read_systems([write(tmp_path, "x.jsonl", rows)])


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = words(tmp_path, "a.jsonl", [1, 2], prompt="hello")
    with pytest.raises(ConfigurationError, match="needs two systems or more; got 1"):
        found([one])
    with pytest.raises(ConfigurationError, match=r"two systems have the name 'a\.jsonl'"):
        found([one, one])
    other = write(tmp_path, "b.jsonl", [{"id": "z", "response": "x"}])
    with pytest.raises(
        ConfigurationError, match=r"no prompt was answered by all systems; .* a\.jsonl: 'p0'; b\.jsonl: 'z'"
    ):
        found([one, other])
    with pytest.raises(ConfigurationError, match=r"the prompt 'p0' of c\.jsonl is not the others'"):
        found([one, words(tmp_path, "c.jsonl", [1, 2], prompt="bye")])


def test_the_command_compares_a_run_with_a_file_and_writes_tables(tmp_path, finished_run):
    run, row_ids = finished_run
    other = write(tmp_path, "other_100%.jsonl", [{"id": each, "response": "a b c"} for each in row_ids])
    outputs = [tmp_path / f"found.{kind}" for kind in ("json", "csv", "tex")]
    done = cage("compare", run, other, *(f"--output={output}" for output in outputs))
    assert done.returncode == 0, done.stderr
    assert "prompts that all systems answered" in done.stdout
    assert "other_100%.jsonl, words" in done.stdout
    tree = json.loads(outputs[0].read_text())
    assert tree["baseline"] == "run"
    assert tree["systems"][1]["scores"]["words"]["mean"] == 3.0
    lines = list(csv.DictReader(outputs[1].read_text().splitlines()))
    assert len(lines) == 2 * 3
    assert float(lines[3]["mean"]) == 3.0
    assert r"other\_100\%.jsonl & 3.000 (3.000 to 3.000)" in outputs[2].read_text()


@pytest.fixture
def finished_run(tiny, tmp_path):
    import io

    import yaml

    from pipeline.config.files import load_config
    from pipeline.stages.relabel import relabel

    row_ids = ["a", "b", "c"]
    write(tmp_path, "in.jsonl", [{"id": each, "prompt": each} for each in row_ids])
    tree = {
        "input": {"path": str(tmp_path / "in.jsonl"), "id": "id"},
        "output": {"path": str(tmp_path / "run")},
        "base": str(tiny("llama")),
        "decoding": {"rule": "base", "max_new_tokens": 4},
        "cluster": {"transport": "local", "slots": 3},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    relabel(load_config(tmp_path / "job.yaml"), tmp_path / "cache", io.StringIO())
    return str(tmp_path / "run"), row_ids


def test_every_answer_is_written_with_its_prompt_and_scores(tmp_path):
    paths = [words(tmp_path, "a.jsonl", [1, 2, 3], prompt="hello"), words(tmp_path, "b.jsonl", [4, 0])]
    judges = tmp_path / "judges.yaml"
    judges.write_text("judges: {words: {kind: length}, nothing: {kind: length, unit: tokens}}")
    output = tmp_path / "scored.jsonl"
    done = cage("compare", *paths, "-c", str(judges), f"--output={output}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["answered_by"], row["row_id"], row["scores"]["words"]) for row in rows] == [
        ("a.jsonl", "p0", 1.0), ("a.jsonl", "p1", 2.0), ("b.jsonl", "p0", 4.0), ("b.jsonl", "p1", 0.0),
    ]  # fmt: skip
    assert all(row["prompt"] == [{"role": "user", "content": "hello"}] for row in rows)
    assert [row["scores"]["nothing"] for row in rows] == [None, None, None, 0.0]  # an empty answer has no tokens


def test_a_text_may_have_the_line_ends_of_unicode(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"id": str(at), "answer": "a\u2028b\x85c"}, ensure_ascii=False) for at in range(2)]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    (system,) = read_systems([str(path)])
    assert [answer.judged.text for answer in system.answers] == ["a\u2028b\x85c"] * 2


def test_an_answer_that_does_not_say_its_tokens_has_no_length_in_tokens(tmp_path):
    rows = [{"id": str(at), "answer": "a b", **({"num_tokens": 3} if at else {})} for at in range(2)]
    paths = [write(tmp_path, name, rows) for name in ("a.jsonl", "b.jsonl")]
    judge = LengthJudge(kind="length", unit="tokens").load(JudgeContext("tokens"))
    scored = score_systems(read_systems(paths), {"tokens": judge})
    assert scored.missing == {"tokens": {"it does not say how many tokens it has (num_tokens)": 2}}
    assert [mean[1, 0] for mean in scored.scores["tokens"]] == [3.0, 3.0]


@pytest.mark.parametrize("prompt", [5, ["hello"], {"role": "user", "content": "hello"}])
def test_a_prompt_that_is_no_prompt_is_refused_in_its_line(tmp_path, prompt):
    path = write(tmp_path, "x.jsonl", [{"id": "a", "answer": "b", "prompt": prompt}])
    with pytest.raises(
        ConfigurationError, match=r"x\.jsonl, line 1: the prompt must be a text or a list of messages"
    ):
        read_systems([path])


def test_an_answer_that_ended_in_its_reasoning_was_cut_in_files_too(tmp_path):
    rows = [{"id": reason, "answer": "b", "finish_reason": reason} for reason in ("stop", "length", "reasoning")]
    (system,) = read_systems([write(tmp_path, "x.jsonl", rows)])
    assert [answer.was_cut for answer in system.answers] == [False, True, True]


def test_ends_of_answers_are_known_by_the_names_of_other_systems(tmp_path):
    reasons = ["eos_token", "end_turn", "max_tokens", "MAX_TOKENS", None]
    rows = [{"id": str(at), "answer": "b", "finish_reason": reason} for at, reason in enumerate(reasons)]
    (system,) = read_systems([write(tmp_path, "x.jsonl", rows)])
    assert [answer.was_cut for answer in system.answers] == [False, False, True, True, None]


def test_a_line_of_a_run_may_have_its_answer_twice(tmp_path):
    row = {"row_id": "p", "id": 3, "response": "a", "completion": [{"role": "assistant", "content": "a"}]}
    (system,) = read_systems([write(tmp_path, "x.jsonl", [row])])
    assert [(answer.row_id, answer.judged.text) for answer in system.answers] == [("p", "a")]


def test_places_whose_last_names_are_equal_are_told_apart_by_their_paths(tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder, "out.jsonl", [{"id": "x", "answer": "y"}]))
    assert [system.name for system in read_systems(paths)] == paths
    with pytest.raises(ConfigurationError, match="give each place once"):
        read_systems([paths[0], paths[0]])
