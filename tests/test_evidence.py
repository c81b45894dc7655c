"""`make evidence`: prompts that are not shared, commands that load, questions whose answers are known."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from jobs.commands.job_files import load_job
from jobs.evidence import questions
from jobs.evidence.charts import Panel, write_chart
from jobs.evidence.prompts import questions_more, split, write_prompts
from jobs.evidence.results import ask, draw
from jobs.evidence.scales import SCALES, SMALL
from jobs.evidence.stages import Marks, Stage, StageFailed, stages
from pipeline.advice.recording import RecordedGames
from pipeline.config.variants import lay_out
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.judges.interface import JudgedAnswer

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
    for stage in stages(scale, tmp_path):
        names.append(stage.name)
        if callable(stage.command):
            continue
        command, option, config, *words = stage.command
        overrides = [word for word in words if not word.startswith("--")]
        job = load_job(Path(config), overrides)
        assert (command in ("synthesize", "train", "advise", "evaluate"), option) == (True, "-c")
        assert job.output.path.startswith(str(tmp_path))
        if isinstance(job, EvaluateConfig) and stage.name.endswith("-temperature"):
            num_weights = len(scale.weights)
            of_rules = (len(scale.rules) - 1) * num_weights * len(scale.agent_temperatures)
            best_of_n = num_weights if "-answer-" in stage.name else 0  # it has no agent temperature
            assert len(lay_out(job)) == 1 + of_rules + best_of_n
    assert len(names) == len(set(names))
    assert len([name for name in names if name.startswith("train-")]) == 2 * len(scale.objectives)


def test_a_stage_that_is_done_is_not_run_again(tmp_path):
    ran = []
    marks = Marks(tmp_path / "_done")
    stage = Stage("one", lambda: ran.append(1), "as it is")
    assert not marks.is_done(stage)
    marks.run(stage)
    assert marks.is_done(stage)
    assert not marks.is_done(Stage("one", stage.command, "otherwise"))
    assert list(marks.seconds()) == ["one"]
    failing = Stage("two", ("relabel", "-c", str(tmp_path / "missing.yaml")), "as it is")
    with pytest.raises(StageFailed, match="stage two: cage relabel ended with code 2"):
        marks.run(failing)
    assert not marks.is_done(failing)


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
    draw(SMALL, asked, tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 6
    for file in drawn:
        root = ElementTree.parse(file).getroot()
        assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) >= 8


def test_a_chart_is_the_same_for_the_same_numbers_and_holds_hostile_names(tmp_path):
    panels = [Panel("<one>", [1, 2], {"a & b": [0.5, float("nan")], "c": [-0.1, 2.0]})]
    for name in ("first.svg", "second.svg"):
        write_chart(tmp_path / name, "a < b", "x", "y", panels)
    first, second = (tmp_path / name for name in ("first.svg", "second.svg"))
    assert first.read_bytes() == second.read_bytes()
    assert "a & b" in "".join(ElementTree.parse(first).getroot().itertext())
