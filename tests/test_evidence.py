"""`make evidence`: prompts that are not shared, commands that load, questions whose answers are known."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from jobs import cli
from jobs.commands.job_files import load_job
from jobs.evidence import questions
from jobs.evidence.__main__ import run
from jobs.evidence.charts import Panel, write_chart
from jobs.evidence.drawing import draw_answers, draw_questions
from jobs.evidence.machine import machine
from jobs.evidence.prompts import questions_more, split, write_prompts
from jobs.evidence.results import ask, ask_again, evaluations, facts, prediction, published, trainings
from jobs.evidence.scales import MEDIUM, SCALES, SMALL, Evaluation
from jobs.evidence.scored import write_scored
from jobs.evidence.small_model import write_small_model
from jobs.evidence.stages import SCORED, Marks, Stage, StageFailed, stages
from pipeline.advice.recording import RecordedGames
from pipeline.config.variants import lay_out
from pipeline.errors import CageError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.judges.interface import JudgedAnswer

app = typer.Typer()
app.command()(run)
JUDGES = Path(__file__).parent.parent / "configs/evidence/judges.py"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def games_of(names, num_games=30, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(num_games, size, generator=generator, dtype=torch.float64)

    base = (2 * normal()).log_softmax(-1)
    rewards = {}
    for name in names:
        rewards[name] = 2 * normal()
        rewards[f"{name}-view"] = rewards[name] + 0.5 * normal()
    return RecordedGames(base, rewards, torch.arange(num_games) % 10, tuple(map(str, range(10))))


def test_no_prompt_is_used_twice():
    training, held_out = split(0)
    more = questions_more(0)
    assert (len(training), len(held_out), len(more)) == (1000, 200, 100)
    everything = [*training, *held_out, *more]
    assert len({each.prompt for each in everything}) == len({each.id for each in everything}) == 1300
    subjects = [{each.id.rsplit("-", 1)[0] for each in side} for side in (training, held_out, more)]
    assert not subjects[0] & subjects[1]
    assert not subjects[2] & subjects[1]


def test_a_smaller_part_is_the_beginning_of_the_same_order(tmp_path):
    write_prompts(tmp_path / "whole", training=1000, advise=100, held_out=200, seed=0)
    write_prompts(tmp_path / "part", training=20, advise=5, held_out=7, seed=0)
    for name, count in (("train-a", 10), ("advise", 5), ("held_out", 7)):
        assert read(tmp_path / f"part/{name}.jsonl") == read(tmp_path / f"whole/{name}.jsonl")[:count]
    halves = [read(tmp_path / f"whole/train-{half}.jsonl") for half in "ab"]
    assert [len(half) for half in halves] == [500, 500]
    assert not {each["id"] for each in halves[0]} & {each["id"] for each in halves[1]}


@pytest.mark.parametrize(("name", "count"), [("training", 0), ("training", 1001), ("advise", 101), ("held_out", 201)])
def test_more_prompts_than_there_are_is_refused(tmp_path, name, count):
    with pytest.raises(ValueError, match=f"{name} must be 1 to"):
        write_prompts(tmp_path, **{"training": 2, "advise": 1, "held_out": 1, name: count}, seed=0)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_command_of_every_stage_is_a_configuration_that_loads(scale, tmp_path):
    names = []
    evaluations = {each.name: each for each in scale.evaluations}
    for stage in stages(scale, tmp_path):
        names.append(stage.name)
        if callable(stage.command):
            continue
        command, option, config, *words = stage.command
        overrides = [word for word in words if not word.startswith("--")]
        job = load_job(Path(config), overrides)
        assert (command in ("synthesize", "train", "advise", "evaluate"), option) == (True, "-c")
        assert job.output.path.startswith(str(tmp_path))
        if isinstance(job, EvaluateConfig):
            evaluation = evaluations[stage.name]
            assert job.input.limit == evaluation.prompts
            are_trained = [str(tmp_path) in str(each) for each in job.principals.values()]
            assert are_trained == [evaluation.kind != "prompted"] * 2
            assert (job.decoding.target_kl is None) == bool(evaluation.agent_temperatures)
            assert job.decoding.unit == evaluation.unit
            free = {"base", "best_of_n"} & set(evaluation.rules)  # they have no agent temperature
            num_games = (len(evaluation.rules) - len(free)) * (len(evaluation.agent_temperatures) or 1)
            num_weights = len(evaluation.weights)
            expected = (num_games + ("best_of_n" in free)) * num_weights + ("base" in free)
            assert len(lay_out(job)) == expected
    assert len(names) == len(set(names))
    assert evaluations.keys() <= set(names)
    num_scored = len({each.principals for each in scale.evaluations if each.kind in SCORED})
    num_trained = len(scale.halves) * len(scale.objectives) * scale.has_arms + num_scored
    assert len([name for name in names if name.startswith("train-")]) == num_trained
    assert ("rewards" in names) == scale.has_views


def test_a_stage_that_is_done_is_not_run_again(tmp_path):
    ran = []
    marks = Marks(tmp_path / "_done")
    stage = Stage("one", lambda: ran.append(1), "as it is")
    assert not marks.is_done(stage)
    assert marks.durations(stage) == {}
    marks.run(stage)
    assert marks.is_done(stage)
    assert not marks.is_done(Stage("one", stage.command, "otherwise"))
    assert marks.durations(stage).keys() == {"seconds", "core_seconds", "machine", "ended"}
    failing = Stage("two", ("relabel", "-c", str(tmp_path / "missing.yaml")), "as it is")
    with pytest.raises(StageFailed, match="stage two: cage relabel ended with code 2"):
        marks.run(failing)
    assert not marks.is_done(failing)


def test_a_stage_says_what_it_ran_on(tmp_path):
    cpu = tmp_path / "cpuinfo"
    cpu.write_text("processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Some CPU\n")
    assert machine(tmp_path, cpu) == "Some CPU"
    (tmp_path / "0000:01").mkdir()
    (tmp_path / "0000:01/information").write_text("Model: \t\t Some GPU\nIRQ: 1\n")
    assert machine(tmp_path, cpu) == "Some GPU"
    assert machine(tmp_path / "none", tmp_path / "none") == platform.machine()


def test_what_an_interrupted_stage_took_is_counted(tmp_path):
    marks, tries = Marks(tmp_path / "_done"), []

    def work():
        tries.append(1)
        time.sleep(0.3)
        if len(tries) == 1:
            raise KeyboardInterrupt

    stage = Stage("one", work, "as it is")
    with pytest.raises(KeyboardInterrupt):
        marks.run(stage)
    assert not marks.is_done(stage)
    marks.run(stage)
    assert marks.durations(stage)["seconds"] >= 0.6
    other = Stage("one", lambda: None, "other sizes")
    marks.run(other)
    assert marks.durations(other)["seconds"] < 0.3


def test_results_are_not_written_before_every_stage_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["--scale", "medium", "--only", "results", "--output", str(tmp_path / "out")])
    assert found.exit_code == 2
    assert "results need every stage; not done: prompts, pairs-a-cheerful" in found.output
    assert not (tmp_path / "out").exists()


def scored_run(folder, scores, finish_reasons):
    """What `cage synthesize` leaves of one prompt's answers and their scores."""
    (folder / "_scores").mkdir(parents=True)
    rows = [
        {"row_id": "x", "sample": at, "prompt": "why", "response": f"answer {at}", "finish_reason": reason}
        for at, reason in enumerate(finish_reasons)
    ]
    known = [{"row_id": "x", "sample": at, "funny": score, "long": 1.0} for at, score in enumerate(scores)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-0.parquet")
    pq.write_table(pa.Table.from_pylist(known), folder / "_scores" / "part-0.parquet")


def test_scored_answers_are_those_that_every_judge_scored(tmp_path):
    scored_run(tmp_path, [0.5, None, float("nan"), 2.0, 3.0], ["stop", "stop", "stop", "length", None])
    write_scored(tmp_path, ["funny", "long"], tmp_path / "scored.jsonl")
    assert read(tmp_path / "scored.jsonl") == [
        {"prompt": "why", "response": "answer 0", "funny": 0.5, "long": 1.0},
        {"prompt": "why", "response": "answer 3", "funny": 2.0, "long": 1.0},
    ]
    with pytest.raises(CageError, match="no answer is scored by funny, dull"):
        write_scored(tmp_path, ["funny", "dull"], tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def test_the_small_model_is_the_first_layers_of_the_base(tiny, tmp_path):
    write_small_model(str(tiny()), tmp_path / "small", layers=1)
    whole, small = (AutoModelForCausalLM.from_pretrained(each) for each in (tiny(), tmp_path / "small"))
    assert (whole.config.num_hidden_layers, small.config.num_hidden_layers) == (2, 1)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        whole.model.layers = whole.model.layers[:1]
        assert torch.equal(whole(ids).logits, small(ids).logits)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (tmp_path / "small").iterdir()}
    with pytest.raises(ValueError, match="has 2 layers; layers must be fewer, got 2"):
        write_small_model(str(tiny()), tmp_path / "other", layers=2)
    assert not (tmp_path / "other").exists()


SCORES = """
def odd(answers):
    return [float(sum(map(ord, each.text)) % 7) for each in answers]


def even(answers):
    return [float(sum(map(ord, each.text)) % 8) for each in answers]
"""


def in_process(*words):
    """A command of `cage`, without seconds of imports for each."""
    cli.app(words, standalone_mode=False)


@pytest.mark.slow
def test_all_stages_run_on_a_tiny_model_and_are_published(tiny, tmp_path):
    """Every kind of principals: ARMs, a preference-aware model, value heads, and games over whole answers."""
    (tmp_path / "scores.py").write_text(SCORES)
    judges = {
        name: f"{{kind: function, function: '{tmp_path}/scores.py:{function}'}}"
        for name, function in (("cheerful", "odd"), ("formal", "even"))
    }
    scale = replace(
        MEDIUM,
        name="tiny",
        training=40,
        pairs={"cheerful": 2, "formal": 1},
        advise=3,
        again=("cheerful", "formal"),
        evaluations=(
            Evaluation("trained_tone", ("base", "linear", "equilibrium"), (0.2, 0.8), 3),
            Evaluation("aware_tone", ("base", "parm", "equilibrium"), (0.2, 0.8), 3),
            Evaluation("value_tone", ("base", "linear", "equilibrium"), (0.5,), 2, agent_temperatures=(0.1, 0.5)),
            Evaluation("trained_tone", ("base", "best_of_n", "linear"), (0.5,), 3, "answer", (0.3, 1.0)),
        ),
    )
    marks = Marks(tmp_path / "_done")
    for stage in stages(scale, tmp_path):
        if not callable(stage.command):
            command = stage.command[0]
            section = {"synthesize": "synthesis", "evaluate": "evaluation"}.get(command)
            words = [f"base.model={tiny()}", "base.dtype=float32"]
            words += [f"{section}.judges.{name}={judge}" for name, judge in judges.items() if section]
            words += ["decoding.max_new_tokens=8"] if command != "train" else []
            stage = replace(stage, command=partial(in_process, *stage.command, *words))
        marks.run(stage)
        assert marks.is_done(stage)
    trained = list(trainings(scale, tmp_path))
    assert [(each["principal"], each["objective"]) for each in trained] == [
        ("aware_tone", "cheerful"), ("aware_tone", "formal"), ("cheerful", "cheerful"), ("formal", "formal"),
        ("value_tone", "cheerful"), ("value_tone", "formal"), ("cheerful", "cheerful"), ("formal", "formal"),
    ]  # fmt: skip
    assert [each["half"] for each in trained] == ["a"] * 6 + ["a-again"] * 2
    told_again = ask_again(scale, RecordedGames.load(tmp_path / "games-again.npz"))
    assert [each["principal"] for each in told_again["rewards_again"]] == ["cheerful", "formal"]
    assert all(each["noise"] > 0 for each in told_again["rewards_again"]), "two seeds are two principals"
    assert {each["weight"] for each in told_again["equal_kl_again"]} == {0.2, 0.5, 0.8}
    judged = list(evaluations(scale, tmp_path))
    assert [(each["set"], each["unit"], each["at"], each["prompts"]) for each in judged] == [
        ("trained_tone", "token", "kl", 3), ("aware_tone", "token", "kl", 3),
        ("value_tone", "token", "temperature", 2), ("trained_tone", "answer", "temperature", 3),
    ]  # fmt: skip
    for found, asked in zip(judged, scale.evaluations, strict=True):
        assert {each["rule"].partition(" ")[0] for each in found["points"]} == set(asked.rules)
        assert {each["metric"] for each in found["differences"]} >= {"mip", "hypervolume", "equal_length"}
    assert list(prediction(scale, {}, judged)) == []
    told = facts(scale, tmp_path)
    assert all(each["seconds"] >= 0 and each["ended"] for each in told["stages"].values())
    draw_answers(scale, judged, tmp_path / "charts")
    assert {file.name for file in (tmp_path / "charts").iterdir()} == {
        "tiny-trained_tone-token-kl.svg", "tiny-aware_tone-token-kl.svg",
        "tiny-value_tone-token-temperature.svg", "tiny-trained_tone-answer-temperature.svg",
    }  # fmt: skip


def test_three_of_many_weight_vectors_are_drawn(tmp_path):
    levels = [
        {
            "weights": {"cheerful": at / 10, "formal": 1 - at / 10},
            "kl_per_token": kl,
            "rule": "linear",
            "weighted": kl,
        }
        for at in range(11)
        for kl in (0.1, 0.2)
    ]
    judged = [{"set": "aware_tone", "unit": "answer", "at": "temperature", "prompts": 7, "equal_kl": levels}]
    draw_answers(MEDIUM, judged, tmp_path)
    titles = [each.text for each in ElementTree.parse(tmp_path / "medium-aware_tone-answer-temperature.svg").iter()]
    assert [each for each in titles if each and each.startswith("cheerful ")] == [
        "cheerful 0.2, formal 0.8", "cheerful 0.5, formal 0.5", "cheerful 0.8, formal 0.2",
    ]  # fmt: skip


def test_what_recorded_rewards_say_is_held_against_judges():
    """One evaluation on curves over KL, read at 0.5 nats, and one whose rows had that target."""
    asked = {
        "equal_kl": [
            {"pair": ["cheerful", "formal"], "weight": 0.2, "target_kl": target, "rule": rule, "share": share}
            for target in (0.1, 0.5)
            for rule, share in (("linear", 1.0), ("equilibrium", target), ("soft_threshold 1", 2 * target))
        ]
    }
    weights = {"cheerful": 0.2, "formal": 0.8}
    curves = [
        {"rule": rule, "weights": weights, "kl_per_token": kl, "weighted": slope * kl}
        for rule, slope in (("linear", 0.5), ("equilibrium", 1.0))
        for kl in (0.2, 0.4, 0.8)
    ]
    points = [
        {"rule": rule, "weights": weights, "weighted": score}
        for rule, score in (("linear", 0.9), ("equilibrium", 0.1), ("soft_threshold", 0.2), ("base", 0.0))
    ]
    kinds = {"set": "trained_tone", "unit": "token"}
    judged = [{**kinds, "at": "temperature", "equal_kl": curves}, {**kinds, "at": "kl", "points": points}]
    swept, fixed = prediction(MEDIUM, asked, [*judged, {**kinds, "unit": "answer", "at": "kl"}])
    assert swept["judged"] == {"linear": pytest.approx(0.25), "equilibrium": pytest.approx(0.5)}
    assert (swept["expected"], swept["rank_correlation"]) == ({"linear": 1.0, "equilibrium": 0.5}, -1.0)
    assert fixed["judged"] == {"linear": 0.9, "equilibrium": 0.1, "soft_threshold": 0.2}
    assert fixed["rank_correlation"] == pytest.approx(0.866, abs=1e-3), "soft_threshold 1 was expected with the sum"


def test_evaluations_of_other_scales_are_read_from_what_was_published(tmp_path):
    for name in ("trained", "gpu"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"evaluations": [{"set": name}]}))
    assert [each["set"] for each in published(SCALES["second"], tmp_path)] == ["trained", "gpu"]
    assert list(published(SMALL, tmp_path)) == []


def test_the_judges_count_what_they_say():
    spec = importlib.util.spec_from_file_location("evidence_judges", JUDGES)
    judges = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judges)

    def score(judge, text):
        return judge([JudgedAnswer([], text)])[0]

    assert score(judges.formal, "Considerable quantities of water") == pytest.approx(2 / 4)
    assert score(judges.formal, "I don't like it!") == pytest.approx((0 - 2 - 1) / 4)
    assert score(judges.simple, "a dog ran") == pytest.approx(-7 / 3)
    for judge in (judges.formal, judges.simple):
        assert score(judge, "...") != score(judge, "...")  # NaN: no score


def test_at_its_own_scale_nothing_is_louder():
    games = games_of(["a", "b"])
    pair = [("a", "b")]
    plain = {each["rule"]: each["gain"] for each in questions.equal_kl(games, pair, [0.3]) if each["weight"] == 0.5}
    scaled = {each["rule"]: each["gain"] for each in questions.scaled(games, pair, 0.3) if each["scale"] == 1.0}
    silent = {each["rule"]: each["gain"] for each in questions.noisy(games, pair, 0.3) if each["noise"] == 0.0}
    assert plain.keys() == scaled.keys() == silent.keys()
    for rule, gain in plain.items():
        assert scaled[rule] == pytest.approx(gain, rel=1e-9)
        assert silent[rule] == pytest.approx(gain, rel=1e-9)


def test_whoever_is_louder_gains_and_the_other_loses():
    rows = list(questions.scaled(games_of(["a", "b"]), [("a", "b")], 0.3))
    for rule in ("linear", "equilibrium"):
        by_scale = {each["scale"]: each for each in rows if each["rule"] == rule}
        assert by_scale[10.0]["loud"] > by_scale[1.0]["loud"] > by_scale[0.1]["loud"]
        assert by_scale[10.0]["other"] < by_scale[1.0]["other"] < by_scale[0.1]["other"]


def test_the_truth_is_at_the_target_and_a_lie_is_beyond_it():
    rows = [each for each in questions.lying(games_of(["a", "b"]), [("a", "b")], 0.3) if each["rule"] == "linear"]
    assert rows[0]["kl"] == pytest.approx(0.3, rel=1e-3)
    assert [each["lie"] for each in rows] == sorted(each["lie"] for each in rows)
    assert rows[-1]["kl"] > rows[0]["kl"]


def free_riders():
    """The game of docs/mathematics.md with two equilibria, once."""
    values = torch.ones(1, 3, 4, dtype=torch.float64)
    values[..., 0] = 0.0
    for j in range(3):
        values[0, j, j + 1] = -10.0
    base = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64).log() - torch.tensor([0.0, 2.0, 2.0, 2.0]).double()
    rewards = {name: 3 * values[:, at] for at, name in enumerate("abc")}  # weights are 1/3
    return RecordedGames(base.log_softmax(-1)[None], rewards, torch.tensor([0]), ("x",))


@pytest.mark.slow
def test_several_equilibria_are_found_where_there_are_and_only_there():
    [found] = questions.equilibria(free_riders(), [["a", "b", "c"]], [1.0], starts=8)
    assert found["games_with_several"] == 1
    assert found["largest_distance"] == pytest.approx(0.9136 - 0.7, abs=1e-3)
    [found] = questions.equilibria(games_of(["a", "b"], num_games=8), [["a", "b"]], [0.3], starts=2)
    assert found["games_with_payments"] > 0
    assert found["games_with_several"] == 0
    assert 0.7 < found["settled_share"] <= 1


@pytest.mark.slow
def test_all_questions_are_asked_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "SCALES", (1.0, 10.0))
    monkeypatch.setattr(questions, "NOISES", (0.0, 1.0))
    monkeypatch.setattr(questions, "LIES", (1.0, 5.0))
    monkeypatch.setattr(questions, "MOST_SWEEPS", 3)
    names = ["cheerful", "formal", "cheerful_prompted", "formal_prompted", "simple_prompted"]
    games = games_of(names, num_games=3, size=5)
    asked = ask(replace(SMALL, starts=1), games, tmp_path / "answers")
    assert {row["principals"] for row in asked["many"]} == {3, 4, 8}
    assert len(asked["rewards"]) == 5
    json.dumps(asked, allow_nan=False)
    (tmp_path / "answers/equal_kl-prompted_tone.json").unlink()
    assert ask(replace(SMALL, starts=1), games, tmp_path / "answers") == asked
    draw_questions(SMALL, asked, tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 6
    for file in drawn:
        root = ElementTree.parse(file).getroot()
        assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) >= 8


def test_panels_have_their_own_axes_where_that_is_asked_and_places_may_have_names(tmp_path):
    panels = [Panel("small", ["3 trained", 4], {"a": [0.0, 0.4]}), Panel("large", [1, 2], {"a": [0.0, 100.0]})]
    texts = []
    for common in (True, False):
        write_chart(tmp_path / "x.svg", "t", "x", "y", panels, common=common)
        texts.append([each.text for each in ElementTree.parse(tmp_path / "x.svg").iter()])
    assert "3 trained" in texts[0]
    assert ("0.4" in texts[0], "0.4" in texts[1], "100" in texts[1]) == (False, True, True)


def test_a_chart_is_the_same_for_the_same_numbers_and_holds_hostile_names(tmp_path):
    panels = [Panel("<one>", [1, 2], {"a & b": [0.5, float("nan")], "c": [-0.1, 2.0]})]
    for name in ("first.svg", "second.svg"):
        write_chart(tmp_path / name, "a < b", "x", "y", panels)
    first, second = (tmp_path / name for name in ("first.svg", "second.svg"))
    assert first.read_bytes() == second.read_bytes()
    assert "a & b" in "".join(ElementTree.parse(first).getroot().itertext())
