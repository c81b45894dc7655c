"""An evaluation from a file of prompts to _metrics.json."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support.judge_models import save_reward_model
from support.storage import tree_bytes

from jobs.commands.evaluate import describe_evaluation, run_evaluate
from jobs.commands.plan import run_plan
from pipeline.config.files import parse_as
from pipeline.errors import CageError, ConfigurationError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.panel import resolve_panel
from pipeline.evaluation.scores import ScoreFiles
from pipeline.stages.evaluate import evaluate
from pipeline.stages.retry import Retry, retry

JUDGES = {
    "words": {"kind": "length"},
    "brevity": {"kind": "brevity"},
    "own": {"kind": "principal", "principal": "kind"},
}
EVALUATION = {"judges": JUDGES, "objectives": {"brief": "brevity", "kind": "own"}, "bootstrap": {"samples": 100}}


def tree_of(tiny, tmp_path: Path, evaluation=EVALUATION, **sections):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"r{at}", "prompt": "tell me " * (at % 3) + "x" * at} for at in range(1, 6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "input": {"path": str(prompts), "id": "id"},
        "output": {"path": str(tmp_path / "run"), "rows_per_shard": 2},
        "base": str(tiny()),
        "principals": {
            "kind": {"kind": "prompted", "principle": "be kind"},
            "brief": {"kind": "prompted", "principle": "be brief"},
        },
        "decoding": {"max_new_tokens": 6, "n": 2},
        "grid": {
            "rules": ["linear", "equilibrium", "base"],
            "agent_temperatures": [0.5, 2.0],
            "weights": [{"kind": 0.7, "brief": 0.3}, {"kind": 0.2, "brief": 0.8}],
        },
        "cluster": {"transport": "local", "slots": 16},
        "evaluation": evaluation,
        **sections,
    }


def run_tree(tree, tmp_path: Path):
    return evaluate(parse_as(EvaluateConfig, json.loads(json.dumps(tree))), tmp_path / "cache", io.StringIO())


@pytest.fixture
def job(tiny, tmp_path):
    """An evaluation that is done; its tree and what came of it."""
    tree = tree_of(tiny, tmp_path)
    return tree, run_tree(tree, tmp_path)


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def test_every_point_is_the_mean_of_what_the_files_hold(job, tmp_path):
    _, done = job
    metrics = json.loads((tmp_path / "run/_metrics.json").read_text())
    assert metrics == done.metrics
    assert metrics["objectives"] == ["kind", "brief"]
    assert [point["rule"] for point in metrics["points"]] == ["linear"] * 4 + ["equilibrium"] * 4 + ["base"]
    answers = pq.read_table(sorted((tmp_path / "run").glob("part-*.parquet"))).to_pylist()
    scores = pq.read_table(sorted((tmp_path / "run/_scores").glob("part-*.parquet"))).to_pylist()
    assert len(answers) == len(scores) == 5 * 9 * 2
    for point in metrics["points"]:
        mine = [
            (answer, score)
            for answer, score in zip(answers, scores, strict=True)
            if score["variant"] == point["variant"]
        ]
        assert len(mine) == 10
        assert all(answer["row_id"] == score["row_id"] for answer, score in mine)
        assert point["scores"]["words"] == pytest.approx(sum(score["words"] for _, score in mine) / 10)
        own = [answer["rewards"]["kind"] / answer["num_tokens"] for answer, _ in mine]
        assert point["objectives"]["kind"] == pytest.approx(sum(own) / 10)
        assert point["kl_per_token"] == pytest.approx(sum(answer["kl_per_token"] for answer, _ in mine) / 10)
        low, high = point["intervals"]["brief"]
        assert low <= point["objectives"]["brief"] <= high
        assert point["weights"].keys() == {"kind", "brief"}
    assert set(metrics["rules"]) == {"linear", "equilibrium", "base"}
    assert set(metrics["reference_point"]) == {"kind", "brief"}
    assert all(metrics[part] for part in ("by_temperature", "control", "equal_kl", "win_rates", "notes", "bootstrap"))


def test_a_judge_that_is_an_objective_is_reported(job):
    _, done = job
    assert any("judge own of kind is no independent judge" in note for note in done.metrics["notes"])
    assert done.metrics["judges"]["own"]["not_independent"]
    assert done.metrics["judges"]["brevity"]["not_independent"] is None
    assert done.metrics["judges"]["brevity"]["measures"] == ["brief"]


def test_a_finished_evaluation_is_left_alone(job, tmp_path):
    tree, first = job
    before = times(tmp_path / "run", "**/*")
    again = run_tree(tree, tmp_path)
    assert not again.was_run
    assert again.metrics == first.metrics
    assert times(tmp_path / "run", "**/*") == before


def test_scores_go_on_shard_by_shard_and_end_with_the_same_bytes(job, tmp_path):
    tree, first = job
    run = tmp_path / "run"
    scored = sorted((run / "_scores").iterdir())
    assert len(scored) == 3
    whole = scored[1].read_bytes()
    scored[1].unlink()
    (run / "_metrics.json").unlink()
    before = times(run, "**/part-*")
    again = run_tree(tree, tmp_path)
    assert again.metrics == first.metrics
    assert scored[1].read_bytes() == whole
    after = times(run, "**/part-*")
    assert {path: after[path] for path in before} == before


def test_scores_of_other_answers_are_replaced(job, tmp_path):
    tree, first = job
    target, other, _ = sorted((tmp_path / "run/_scores").iterdir())
    whole = target.read_bytes()
    target.write_bytes(other.read_bytes())
    assert run_tree(tree, tmp_path).metrics == first.metrics
    assert target.read_bytes() == whole


def test_other_judges_score_the_same_answers_again(job, tmp_path):
    tree, first = job
    answers, scores = times(tmp_path / "run", "part-*"), tree_bytes(tmp_path / "run/_scores")
    judges = {**JUDGES, "brevity": {"kind": "brevity", "half_words": 2}}
    second = run_tree({**tree, "evaluation": {**EVALUATION, "judges": judges}}, tmp_path)
    assert second.was_run
    assert second.metrics["points"] != first.metrics["points"]
    assert times(tmp_path / "run", "part-*") == answers
    assert tree_bytes(tmp_path / "run/_scores") != scores
    assert run_tree(tree, tmp_path).metrics == first.metrics
    assert tree_bytes(tmp_path / "run/_scores") == scores


def test_settings_of_the_comparison_judge_nothing_again(job, tmp_path):
    tree, first = job
    before = times(tmp_path / "run", "**/part-*")
    reference = {"kind": -50.0, "brief": 0.0}
    second = run_tree({**tree, "evaluation": {**EVALUATION, "reference_point": reference}}, tmp_path)
    assert second.metrics["reference_point"] == reference
    assert second.metrics["rules"]["base"]["hypervolume"] > first.metrics["rules"]["base"]["hypervolume"]
    assert times(tmp_path / "run", "**/part-*") == before


def test_failed_prompts_are_left_out_of_every_rule(tiny, tmp_path):
    tree = tree_of(tiny, tmp_path, errors={"budget": "50%"})
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "x" * 600}) + "\n")
    metrics = run_tree(tree, tmp_path).metrics
    assert metrics["num_prompts"] == 5
    assert metrics["num_failed"] == 18
    assert all(point["n"] == 5 for point in metrics["points"])
    run, was_run = retry(Retry(str(tmp_path / "run")), tmp_path / "cache", io.StringIO())
    assert (was_run, run.status().reruns, run.status().rows_failed) == (True, 1, 18)  # it fails as before
    again = run_tree(tree, tmp_path)
    assert again.metrics["points"] == metrics["points"]


def test_a_run_without_a_grid_is_measured_too(tiny, tmp_path):
    done = run_tree(tree_of(tiny, tmp_path, grid={}), tmp_path)
    [point] = done.metrics["points"]
    assert (point["rule"], point["weights"]) == ("equilibrium", {"kind": 1.0, "brief": 1.0})
    assert done.metrics["equal_kl"] == done.metrics["win_rates"] == done.metrics["reading"] == []
    assert "reference point" in describe_evaluation(done)


def test_scores_that_are_missing_are_counted_and_those_to_come_are_asked_for_again(tiny, tmp_path):
    """A judge that is slow for some answers, and then is not."""
    mark = tmp_path / "slow"
    mark.touch()
    (tmp_path / "own.py").write_text(
        "import time\nfrom pathlib import Path\n\n\ndef score(answers):\n"
        f"    if Path({str(mark)!r}).exists() and answers[0].prompt[0]['content'].endswith('xxxx'):\n"
        "        time.sleep(1)\n    return [float(len(answers[0].text))]\n"
    )
    own = {"kind": "function", "function": f"{tmp_path / 'own.py'}:score", "timeout_s": 0.4}
    evaluation = {"judges": {"own": own}, "objectives": {"kind": "own"}, "bootstrap": {"samples": 100}}
    grid = {"rules": ["base"], "agent_temperatures": [0.5], "weights": [{"kind": 1.0, "brief": 0.0}]}
    tree = tree_of(tiny, tmp_path, evaluation, grid=grid)
    out = io.StringIO()
    first = evaluate(parse_as(EvaluateConfig, tree), tmp_path / "cache", out)
    line = "judge own gave no score for 4 of 10 answers: it took longer than 0.4 s (4); they are left out"
    assert line in out.getvalue()
    assert any(line in note for note in first.metrics["notes"])
    assert first.metrics["num_prompts"] == 3
    answers = times(tmp_path / "run", "part-*")
    mark.unlink()
    second = run_tree(tree, tmp_path)
    assert second.metrics["num_prompts"] == 5
    assert not any("no score" in note for note in second.metrics["notes"])
    assert times(tmp_path / "run", "part-*") == answers
    assert not run_tree(tree, tmp_path).was_run


def test_a_python_function_measures_an_objective(tiny, tmp_path):
    def characters(answers):
        return [len(answer.text) for answer in answers]

    evaluation = {**EVALUATION, "judges": {**JUDGES, "characters": characters}}
    evaluation["objectives"] = {"brief": "characters", "kind": "own"}
    config = parse_as(EvaluateConfig, tree_of(tiny, tmp_path, evaluation))
    metrics = evaluate(config, tmp_path / "cache", io.StringIO()).metrics
    answers = pq.read_table(sorted((tmp_path / "run").glob("part-*.parquet"))).to_pylist()
    [base] = [point for point in metrics["points"] if point["rule"] == "base"]
    lengths = [len(answer["response"]) for answer in answers if answer["rule"] == "base"]
    assert base["objectives"]["brief"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["judges"]["characters"]["function"].endswith(".characters")
    assert not evaluate(config, tmp_path / "cache", io.StringIO()).was_run


def test_nothing_to_compare_is_reported(tiny, tmp_path):
    (tree := tree_of(tiny, tmp_path))["errors"] = {"budget": "100%"}
    (tmp_path / "prompts.jsonl").write_text('{"id": "bad", "prompt": null}\n')
    with pytest.raises(CageError, match="no prompt was answered and judged"):
        run_tree(tree, tmp_path)


def test_a_judge_that_cannot_be_found_is_reported_before_anything_is_decoded(tiny, tmp_path):
    judges = {**JUDGES, "rm": {"kind": "reward_model", "model": "/no/such/reward-model"}}
    with pytest.raises(ConfigurationError, match="/no/such/reward-model"):
        run_tree(tree_of(tiny, tmp_path, {**EVALUATION, "judges": judges}), tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_command_prints_rules_reference_point_and_reading(job, tmp_path, monkeypatch, capfd):
    tree, _ = job
    monkeypatch.setenv("CAGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    run_evaluate(path, [], print_config=False, is_verbose=False)
    shown = capfd.readouterr().out
    for words in ("nothing to do", "equilibrium 0.5", "linear all", "reference point of the hypervolume: kind ",
                  "At equal KL to the base, equilibrium is", "no independent judge", "_metrics.json"):  # fmt: skip
        assert words in shown
    assert b"At equal KL to the base, equilibrium is" in (tmp_path / "run/_report.html").read_bytes()
    run_evaluate(path, ["evaluation.bootstrap.samples=120"], print_config=True, is_verbose=False)
    assert yaml.safe_load(capfd.readouterr().out)["evaluation"]["bootstrap"]["samples"] == 120
    run_plan(path, [])
    assert "9 variants of rules linear, equilibrium, base" in capfd.readouterr().out


@pytest.mark.ray
def test_model_judges_score_on_actors_as_in_one_process(tiny, tmp_path, ray_cluster):
    folder = save_reward_model(tmp_path / "rm", context=512)
    evaluation = {"judges": {"rm": {"kind": "reward_model", "model": str(folder)}}, "objectives": {"kind": "rm"}}
    tree = tree_of(tiny, tmp_path, evaluation, decoding={"max_new_tokens": 4})
    done = run_tree(tree, tmp_path)
    scored = sorted((tmp_path / "run/_scores").iterdir())
    in_process = [path.read_bytes() for path in scored]
    for path in scored:
        path.unlink()
    tree["cluster"] = {"transport": "ray", "replicas": 2, "slots": 16}
    assert run_tree(tree, tmp_path).metrics == done.metrics
    assert [path.read_bytes() for path in scored] == in_process


def test_a_judge_that_cannot_be_loaded_on_an_actor_says_why(job, tmp_path):
    from pipeline.cluster.scoring import ShardScorer

    tree, done = job
    folder = save_reward_model(tmp_path / "rm")
    judges = {"rm": {"kind": "reward_model", "model": str(folder)}}
    tree = {**tree, "evaluation": {"judges": judges, "objectives": {"kind": "rm"}}}
    panel = resolve_panel(parse_as(EvaluateConfig, tree).evaluation.judges, tmp_path)
    (folder / "model.safetensors").unlink()
    [record, *_] = done.run.committed().values()
    error = ShardScorer(ScoreFiles(done.run, panel)).score(record)
    assert isinstance(error, ConfigurationError)
    assert "weights" in str(error)


def test_an_evaluation_is_extended_and_mended_and_judges_what_is_new(tiny, tmp_path):
    """Its numbers are those of an evaluation of all rows as they are in the end."""
    (tmp_path / "whole").mkdir()
    whole = run_tree(tree_of(tiny, tmp_path / "whole"), tmp_path / "whole").metrics
    tree = tree_of(tiny, tmp_path)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join([lines[0], '{"id": "r2", "prompt": "another"}\n', lines[2]]))
    run_tree(tree, tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    retry(Retry(str(tmp_path / "run"), mended=str(tmp_path / "prompts.jsonl")), tmp_path / "cache", io.StringIO())
    before = times(tmp_path / "run", "_scores/part-*")
    config = parse_as(EvaluateConfig, json.loads(json.dumps(tree)))
    done = evaluate(config, tmp_path / "cache", io.StringIO(), may_extend=True)
    assert before.items() <= times(tmp_path / "run", "_scores/part-*").items()
    assert len(list((tmp_path / "run/_scores").iterdir())) == len(done.run.plan.shards) == 3
    for name in ("points", "rules", "num_prompts", "num_failed", "differences"):
        assert done.metrics[name] == whole[name]
    assert not evaluate(config, tmp_path / "cache", io.StringIO()).was_run
