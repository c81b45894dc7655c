"""Every example runs, on tiny models, and prints what it promises."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from support.tiny_models import make_model

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here_and_short():
    assert EXAMPLES == ["own_scorer", "per_row_weights", "quickstart", "ray_data", "solve_a_game"]
    lengths = {name: len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) for name in EXAMPLES}
    assert max(lengths.values()) < 60, lengths


def test_quickstart_prints_every_token_of_the_answer(tiny, capsys):
    load("quickstart").main(str(tiny("llama")))
    lines = capsys.readouterr().out.splitlines()
    tokens = [line for line in lines if "  base " in line]
    assert 1 <= len(tokens) <= 32
    assert sum(line.startswith(("cheerful: reward", "brief: reward")) for line in lines) == 2


def test_per_row_weights_prints_an_answer_for_each_weight(tiny, capsys):
    load("per_row_weights").main(str(tiny("llama")))
    out = capsys.readouterr().out
    for share in ("0.00", "0.25", "0.50", "0.75", "1.00"):
        assert f"cheerful {share}, " in out


def test_own_scorer_compares_the_rules_by_the_function(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = load("own_scorer")
    module.main(str(tiny("llama")), str(tmp_path / "run"))
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "run" / "_metrics.json").is_file()
    assert list((tmp_path / "run" / "_scores").glob("*.parquet"))


def test_solve_a_game_shows_an_equilibrium(capsys):
    load("solve_a_game").main()
    lines = capsys.readouterr().out.splitlines()
    yes = lines[1].split()
    assert yes[0] == "yes"
    base, weighted, equilibrium = map(float, yes[1:4])
    assert base < equilibrium < weighted  # the stronger principal shades its bid
    assert float(lines[-1].split("residual ")[1].split(";")[0]) < 1e-6


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_answers_every_row(tmp_path, capsys):
    load("ray_data").main(str(make_model(tmp_path / "model")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "  ->  " in line]
    assert len(lines) == 4
