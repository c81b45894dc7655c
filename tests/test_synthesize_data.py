"""Training data out of given answers: filters, pairs, splits, files."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset, load_from_disk
from support.storage import s3_server, tree_bytes
from support.synthesis import dataset_of, finished_run, key_of, rows_of

from pipeline.errors import ConfigurationError, StorageError
from pipeline.records import FinishReason
from pipeline.synthesis.duplicates import EXACT, NEAR, KeptTexts, similarity
from pipeline.synthesis.export import export
from pipeline.synthesis.settings import SynthesisConfig

LONG = "one two three four five six seven eight nine ten"
VECTORS = [{"brief": 1.0, "kind-1": 0.0}, {"brief": 0.25, "kind-1": 0.75}]

FILTERS = {
    "finish_reasons": ({}, [LONG, {"finish_reason": FinishReason.LENGTH}], "filters.finish_reasons", None),
    "empty": ({}, [LONG, {"text": " \n", "num_tokens": 3}], "empty", None),
    "min_tokens": ({"min_tokens": 4}, [LONG, "one two"], "filters.min_tokens", 3),
    "max_tokens": ({"max_tokens": 5}, ["one two", LONG], "filters.max_tokens", 11),
    "max_repetition": ({"max_repetition": 0.4}, [LONG, "a b c a b c"], "filters.max_repetition", 0.5),
    "min_rewards": (
        {"min_rewards": {"kind-1": 3}},
        [{"reward": 1.5}, {"reward": 1}],
        "filters.min_rewards.kind-1",
        2,
    ),
    "min_rewards_per_token": (
        {"min_rewards_per_token": {"brief": 0.5}},
        [{"reward": 1.5}, {"reward": 1.2}],  # three tokens each
        "filters.min_rewards_per_token.brief",
        pytest.approx(0.4),
    ),
    "no reward": (
        {"min_rewards": {"brief": -9}},
        [LONG, {"rewards": {"brief": None, "kind-1": 1.0}}],
        "filters.min_rewards.brief",
        None,
    ),
    "no score": ({}, [LONG, {"rewards": {"brief": 0.0, "kind-1": None}}], "no score", None),
    "duplicate": ({}, ["the same", " the  same\n"], "filters.duplicates.exact", None),
    "near duplicate": (
        {"duplicates": {"near": 0.8}},
        [LONG, LONG.replace("ten", "ten!")],
        "filters.duplicates.near",
        None,
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_drops_what_it_should_and_counts_it(tmp_path, name):
    filters, [good, bad], reason, value = FILTERS[name]
    run = finished_run(
        tmp_path,
        {"a": [good, bad], "b": [bad, good]},
    )
    if "duplicate" in name:  # which of the two comes first decides
        run = finished_run(tmp_path / "once", {"a": [good, bad]})
    dataset = dataset_of(run, filters=filters, write="sft", score="reward", sft={"best": 9})
    num_prompts = run.plan.num_rows
    expected = {("a", 0, 0), ("b", 0, 1)} if num_prompts == 2 else {("a", 0, 0)}
    assert {key_of(row) for row in rows_of(dataset, "sft")} == expected
    counts = dataset.manifest["sft"]
    assert counts["answers_dropped"] == {reason: num_prompts}
    assert counts["answers_used"] + num_prompts == dataset.manifest["answers"] == 2 * num_prompts
    dropped = rows_of(dataset, "dropped")
    assert {row["reason"] for row in dropped} == {reason}
    assert dropped[0]["value"] == value
    assert {key_of(row) for row in dropped} | expected == {
        (row, 0, sample) for row in "ab"[:num_prompts] for sample in range(2)
    }


def random_answers(generator: random.Random, num_rows: int, num_answers: int):
    words = LONG.split()
    return {
        f"r{at}": [
            {
                "text": " ".join(generator.choices(words, k=generator.randrange(0, 6))),
                "reward": generator.choice([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0]),
                "finish_reason": generator.choice([FinishReason.STOP] * 5 + [FinishReason.LENGTH]),
            }
            for _ in range(num_answers)
        ]
        for at in range(num_rows)
    }


@pytest.mark.parametrize("select", ["best_worst", "all"])
@pytest.mark.parametrize("weak_rejected", [False, True])
def test_every_answer_is_used_or_dropped_once_and_pairs_are_sound(tmp_path, select, weak_rejected):
    answers = random_answers(random.Random(select), num_rows=40, num_answers=10)
    run = finished_run(tmp_path, answers, grid={"weights": VECTORS})
    pairs = {"select": select, "min_margin": 0.75, "weak_rejected": weak_rejected}
    pairs |= {"max_pairs": 3} if select == "all" else {}
    filters = {"min_rewards": {"brief": -1}, "duplicates": {"near": 0.7}}
    dataset = dataset_of(run, filters=filters, pairs=pairs, sft={"best": 2}, validation=0.3)
    everything = {(f"r{row}", variant, sample) for row in range(40) for variant in range(2) for sample in range(5)}
    made = rows_of(dataset, "preferences")
    used = {
        "sft": {key_of(row) for row in rows_of(dataset, "sft")},
        "preferences": {
            (row["row_id"], row[f"variant_{side}"], row[f"sample_{side}"])
            for row in made
            for side in ("chosen", "rejected")
        },
    }
    dropped = rows_of(dataset, "dropped")
    for kind in used:
        found = [key_of(row) for row in dropped if row["kind"] == kind]
        counts = dataset.manifest[kind]
        assert len(found) == len(set(found))
        assert set(found) | used[kind] == everything
        assert not set(found) & used[kind]
        assert counts["answers_used"] == len(used[kind])
        assert counts["answers_dropped"] == Counter(row["reason"] for row in dropped if row["kind"] == kind)
    stored = {key_of(row): row for row in rows_in(run)}
    num_by_group = Counter()
    for row in made:
        chosen, rejected = (
            stored[row["row_id"], row[f"variant_{side}"], row[f"sample_{side}"]] for side in ("chosen", "rejected")
        )
        assert chosen["weights"] == rejected["weights"] == row["weights"]
        scores = [
            sum(each["weights"][name] * each["rewards"][name] for name in each["weights"])
            for each in (chosen, rejected)
        ]
        assert [row["score_chosen"], row["score_rejected"]] == scores
        assert row["margin"] == scores[0] - scores[1] >= 0.75
        assert row["prompt"] == chosen["prompt"] == rejected["prompt"]
        assert (row["chosen"], row["rejected"]) == (chosen["completion"], rejected["completion"])
        assert chosen["rewards"]["brief"] >= -1
        assert chosen["finish_reason"] == rejected["finish_reason"] == "stop"
        num_by_group[row["row_id"], row["variant_chosen"]] += 1
    assert made
    assert max(num_by_group.values()) == (1 if select == "best_worst" else 3)
    assert any(row["rewards_rejected"]["brief"] < -1 for row in made) is weak_rejected


def rows_in(run):
    rows = [
        row for path in sorted(Path(run.store.path).glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    return [{"variant": 0, **row} for row in rows]


def test_the_best_and_the_worst_make_the_pair(tmp_path):
    answers = [{"reward": reward} for reward in (0.5, 3.0, -1.0, 2.0)]
    run = finished_run(tmp_path, {"a": answers})
    dataset = dataset_of(run)
    [pair] = rows_of(dataset, "preferences")
    assert (pair["sample_chosen"], pair["sample_rejected"], pair["margin"]) == (1, 2, 12.0)
    assert dataset.manifest["preferences"]["answers_dropped"] == {"neither best nor worst": 2}
    per_token = dataset_of(run, score="reward_per_token")
    assert rows_of(per_token, "preferences")[0]["margin"] == 4.0  # three tokens each
    assert dataset_of(run, pairs={"min_margin": 13}, write=["sft", "preferences"]).manifest["preferences"] == {
        "rows": {"train": 0, "validation": 0},
        "answers_used": 0,
        "answers_dropped": {"pairs.min_margin": 4},
    }


def test_the_best_are_kept_for_each_weight_vector(tmp_path):
    answers = [{"rewards": {"brief": at, "kind-1": -at}, "text": f"answer {at % 4}"} for at in range(8)]
    dataset = dataset_of(finished_run(tmp_path, {"a": answers}, grid={"weights": VECTORS}), sft={"best": 1})
    assert [key_of(row)[1:] for row in rows_of(dataset, "sft")] == [(0, 3), (1, 0)]


def test_judges_filter_and_rank(tmp_path):
    judges = {
        "words": {"kind": "length"},
        "tone": {"kind": "sentiment"},
        "own": {"kind": "principal", "principal": "brief", "per": "answer"},
    }
    texts = ["I love it, wonderful!", "I hate this awful thing.", "It is so.", "Good, happy, lovely, great, fine day"]
    answers = [{"text": text, "reward": 4 - at} for at, text in enumerate(texts)]
    run = finished_run(tmp_path, {"a": answers, "b": answers[::-1]}, output={"rows_per_shard": 1})
    filters = {"judges": {"tone": {"min": 0.1}, "words": {"max": 5}}}
    dataset = dataset_of(run, judges=judges, filters=filters, score="tone", pairs={"weak_rejected": True})
    kept = {row["messages"][-1]["content"]: row["judged"] for row in rows_of(dataset, "sft")}
    assert set(kept) == {texts[0]}
    assert kept[texts[0]]["words"] == 4
    assert kept[texts[0]]["own"] == 4.0
    assert kept[texts[0]]["tone"] > 0.5
    counts = {"filters.judges.tone": 4, "filters.judges.words": 2}
    assert dataset.manifest["sft"]["answers_dropped"] == counts
    for pair in rows_of(dataset, "preferences"):
        assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == (texts[0], texts[1])
        assert pair["margin"] == pair["judged_chosen"]["tone"] - pair["judged_rejected"]["tone"] > 1
    again = dataset_of(run, judges=judges | {"words": {"kind": "length", "scale": 0.5}}, filters=filters, score="own")
    assert again.was_made
    assert again.manifest["sft"]["answers_dropped"] == {"filters.judges.tone": 4}


@pytest.mark.parametrize(("within", "num_kept"), [("prompt", 3), ("dataset", 1)])
def test_duplicates_are_looked_for_within_a_prompt_or_everywhere(tmp_path, within, num_kept):
    answers = {name: [LONG, f"{LONG}!", f"{LONG}?"] for name in ("a", "b", "again")}
    prompts = {"again": "question a"}  # the same prompt once more: an exact duplicate
    run = finished_run(tmp_path, answers, prompts=prompts)
    exact = dataset_of(run, write="sft")
    assert exact.manifest["sft"]["answers_used"] == 6
    assert exact.manifest["sft"]["answers_dropped"] == {"filters.duplicates.exact": 3}
    near = dataset_of(run, write="sft", filters={"duplicates": {"near": 0.9, "within": within, "exact": False}})
    assert near.manifest["sft"]["answers_used"] == num_kept
    assert set(near.manifest["sft"]["answers_dropped"]) == {"filters.duplicates.near"}


@pytest.mark.parametrize("near", [0.3, 0.6, 0.8, 0.95])
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(near):
    generator = random.Random(7)
    words = [f"{first}{second}" for first in ("al", "be", "cor", "du") for second in ("na", "mi", "tre", "x")]
    texts = [" ".join(generator.choices(words, k=25)) for _ in range(40)]
    for text in list(texts):
        copied = text.split()
        for at in generator.sample(range(25), generator.choice([1, 2, 4, 8])):
            copied[at] = generator.choice(words)
        texts.append(" ".join(copied))
    kept = KeptTexts(exact=False, near=near)
    added: list[str] = []
    expected, found = 0, 0
    for text in texts:
        is_near = any(similarity(text, other) >= near for other in added)
        reason = kept.find(text)
        assert reason in ((NEAR, None) if is_near else (None,))
        expected += is_near
        found += reason is not None
        kept.add(text)
        added.append(text)
    assert found >= 0.95 * expected > 0


def test_equal_texts_are_duplicates_in_their_own_context_only():
    kept = KeptTexts(exact=True, near=None)
    kept.add("yes  indeed", context=b"a")
    assert kept.find("yes indeed ", context=b"a") == EXACT
    assert kept.find("yes indeed", context=b"b") is None
    assert kept.find("Yes indeed", context=b"a") is None


def test_the_split_is_by_prompt_and_depends_on_nothing_else(tmp_path):
    answers = {f"r{at}": [f"one {at}", f"two {at}"] for at in range(200)}
    prompts = {f"r{at}": f"question {at % 100}" for at in range(200)}  # each prompt twice
    dataset = dataset_of(finished_run(tmp_path / "all", answers, prompts=prompts), validation=0.2)

    def prompts_of(dataset, stem):
        return {row["messages"][0]["content"] for row in rows_of(dataset, f"sft/{stem}")}

    train, validation = prompts_of(dataset, "train"), prompts_of(dataset, "validation")
    assert not train & validation
    assert len(train | validation) == 100
    assert 10 <= len(validation) <= 30
    in_pairs = {row["prompt"][0]["content"] for row in rows_of(dataset, "preferences/validation")}
    assert in_pairs == validation
    few = {row_id: answers[row_id] for row_id in list(answers)[37:60]}
    part = dataset_of(finished_run(tmp_path / "few", few, prompts={key: prompts[key] for key in few}), validation=0.2)
    assert prompts_of(part, "validation") == validation & {prompts[row_id] for row_id in few}
    other = dataset_of(dataset.run, validation=0.2, seed=1)
    assert prompts_of(other, "validation") != validation


def test_conversations_with_tools_keep_them(tmp_path):
    user, tool = {"role": "user", "content": "warm?"}, {"type": "function", "function": {"name": "weather"}}

    def row(row_id, city, **fields):
        call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        asked = {"role": "assistant", "content": None, "tool_calls": [call]}
        found = {"role": "tool", "content": "21", "tool_call_id": "c"}
        return {"id": row_id, "messages": [user, asked, found], "tools": [tool], **fields}

    rows = [row("a", "Rome"), row("b", "Oslo"), row("c", "Oslo", tools=[tool, tool])]
    rows.append({"id": "d", "messages": [user]})
    run = finished_run(tmp_path, {key: ["no", "yes"] for key in "abcd"}, rows=rows)
    dataset = dataset_of(run, sft={"best": 1}, score="reward")
    sft, pairs = rows_of(dataset, "sft"), rows_of(dataset, "preferences")
    assert [each["row_id"] for each in sft] == [each["row_id"] for each in pairs] == list("abcd")
    for each, given, pair in zip(sft, rows, pairs, strict=True):
        assert each["messages"][:-1] == pair["prompt"]
        assert each["tools"] == pair["tools"] == (json.dumps(given["tools"]) if "tools" in given else None)
    assert [each["messages"][1]["tool_calls"][0]["function"]["arguments"] for each in sft[:2]] == [
        '{"city": "Rome"}',
        '{"city": "Oslo"}',
    ]
    assert sft[0]["messages"][2]["tool_call_id"] == "c"
    assert load_dataset(str(tmp_path / "run/_dataset"), "sft", split="train", cache_dir=str(tmp_path / "hf")).num_rows


def test_the_same_settings_do_nothing_and_others_make_it_again(tmp_path):
    answers = random_answers(random.Random(0), num_rows=30, num_answers=4)
    run = finished_run(tmp_path, answers)
    settings = {"rows_per_file": 7, "validation": 0.3, "filters": {"duplicates": {"near": 0.8}}}
    first = dataset_of(run, **settings)
    folder = tmp_path / "run/_dataset"
    before = tree_bytes(folder, "**/*.*")
    assert first.was_made
    assert len([name for name in before if name.startswith("sft/train")]) > 2
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = dataset_of(run, **settings)
    assert not again.was_made
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times

    (folder / "notes.txt").write_text("mine")
    other = dataset_of(run, write="preferences")
    assert other.was_made
    assert {path.name for path in folder.rglob("*.*")} == {
        "README.md", "manifest.json", "notes.txt", "train-00000-of-00001.parquet", "dropped-00000-of-00001.parquet",
    }  # fmt: skip
    (folder / "notes.txt").unlink()
    dataset_of(run, **settings)
    assert tree_bytes(folder, "**/*.*") == before
    (folder / "sft/train-00001-of-00003.parquet").unlink(missing_ok=True)
    next(folder.glob("sft/train-00000*")).unlink()
    assert dataset_of(run, **settings).was_made
    assert tree_bytes(folder, "**/*.*") == before


class Killed(Exception):
    pass


class MortalStore:
    """Passes everything on and dies before its `writes`-th write."""

    def __init__(self, store, writes):
        self._store = store
        self._left = writes

    def put(self, name, data):
        if self._left == 0:
            raise Killed
        self._left -= 1
        self._store.put(name, data)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_what_was_killed_between_two_files_ends_with_the_same_bytes(tmp_path):
    answers = random_answers(random.Random(1), num_rows=20, num_answers=3)
    settings = {"rows_per_file": 9, "validation": 0.3}
    expected_run = finished_run(tmp_path / "whole", answers)
    expected = dataset_of(expected_run, **settings)
    whole = tree_bytes(tmp_path / "whole/run/_dataset", "**/*.*")
    num_writes = len(expected.manifest["files"]) + 2  # the card and the manifest
    run = finished_run(tmp_path, answers)
    dataset_of(run, write="sft")  # an earlier data set of other settings is being replaced
    for writes in range(num_writes):
        with pytest.raises(Killed):
            dataset_of(replace(run, store=MortalStore(run.store, writes)), **settings)
        assert not (tmp_path / "run/_dataset/manifest.json").exists()
    assert dataset_of(run, **settings).was_made
    assert tree_bytes(tmp_path / "run/_dataset", "**/*.*") == whole


def test_a_data_set_in_an_object_store_has_the_bytes_of_a_local_one(tmp_path):
    answers = random_answers(random.Random(3), num_rows=12, num_answers=3)
    settings = {"rows_per_file": 9, "validation": 0.3}
    dataset_of(finished_run(tmp_path, answers), **settings)
    with s3_server():
        store = fsspec.filesystem("s3")
        store.mkdir("data")
        run = finished_run(tmp_path / "again", answers, place="s3://data/run")
        dataset_of(run, write="sft")
        dataset = dataset_of(run, **settings)
        names = [path.removeprefix("data/run/_dataset/") for path in store.find("data/run/_dataset")]
        stored = {name: store.cat_file(f"data/run/_dataset/{name}") for name in names}
        assert export(dataset, tmp_path / "exported")
        assert not dataset_of(run, **settings).was_made
    assert stored == tree_bytes(tmp_path / "run/_dataset", "**/*.*")
    exported = load_from_disk(str(tmp_path / "exported/sft"))
    assert {split: len(rows) for split, rows in exported.items()} == dataset.manifest["sft"]["rows"]


def test_the_card_loads_as_it_is_and_escapes_what_came_from_outside(tmp_path):
    hostile = "be | kind <script>alert(1)</script>\n# Heading"
    principals = {
        "brief": {"kind": "prompted", "principle": hostile},
        "kind-1": {"kind": "prompted", "principle": "x"},
    }
    answers = random_answers(random.Random(2), num_rows=30, num_answers=4)
    run = finished_run(tmp_path, answers, principals=principals)
    licences = {"input": "CC0 <b>1.0</b>", "base": "Apache-2.0"}
    dataset = dataset_of(run, validation=0.3, rows_per_file=5, licences=licences, score="reward_per_token")
    for kind in ("sft", "preferences"):
        loaded = load_dataset(str(tmp_path / "run/_dataset"), kind, cache_dir=str(tmp_path / "hf"))
        assert {split: rows.num_rows for split, rows in loaded.items()} == dataset.manifest[kind]["rows"]
        assert loaded["train"].to_list() == rows_of(dataset, f"{kind}/train")
    card = (tmp_path / "run/_dataset/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert [config["config_name"] for config in front["configs"]] == ["sft", "preferences"]
    assert "<script>" not in card
    assert "\n# Heading" not in card
    assert "CC0 &lt;b&gt;1.0" in card
    assert "| base | tiny@abc123 | Apache-2.0 |" in card
    assert "| principals.brief.model | tiny@abc123 | unknown |" in card
    assert "brief 1, kind-1 1" in card
    counts = dataset.manifest["sft"]
    assert f"| used | {counts['answers_used']} |" in card
    for reason, count in counts["answers_dropped"].items():
        assert f"| {reason.replace('_', chr(92) + '_')} | {count} |" in card
    histogram = dataset.manifest["histograms"]["preferences.margin"]
    assert sum(histogram["counts"]) == len(rows_of(dataset, "preferences"))
    assert " ".join(map(str, histogram["counts"])) in card


def test_a_data_set_without_any_row_is_refused_with_the_reasons(tmp_path):
    run = finished_run(tmp_path, {"a": ["x y", "z"], "b": ["x", "w"]})
    with pytest.raises(ConfigurationError, match=r"none of 4 answers is left.*4 by filters.min_tokens"):
        dataset_of(run, filters={"min_tokens": 50})
    assert not (tmp_path / "run/_dataset").exists()


def test_a_damaged_manifest_is_reported(tmp_path):
    run = finished_run(tmp_path, {"a": ["x y", "z"]})
    dataset_of(run)
    (tmp_path / "run/_dataset/manifest.json").write_text(json.dumps({"files": []}))
    with pytest.raises(StorageError, match="is not a manifest"):
        dataset_of(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": {"duplicates": {"within": "dataset"}}}, "within: no effect without near"),
        ({"pairs": {"max_pairs": 4}}, "max_pairs: no effect with select: best_worst"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SynthesisConfig.model_validate(settings)
    SynthesisConfig.model_validate(SynthesisConfig().model_dump())  # defaults that are written out
