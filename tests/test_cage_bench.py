"""The benchmark runs, and its numbers mean what they say."""

import json

import pytest
import torch
from typer.testing import CliRunner

import cage
from cage.examples import random_games
from jobs.bench.cli import bench
from jobs.bench.solver import solve_as_published, sweep_cells


@pytest.mark.slow
def test_the_quick_benchmark_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "solver.json"
    done = CliRunner().invoke(bench, ["solver", "--quick", "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "threshold newton" in done.output
    measured = json.loads(file.read_text())
    newton = [row for row in measured["speeds"] if row["method"] == "threshold newton"]
    assert newton
    assert all(row["converged"] == 1.0 and row["worst_residual"] <= 1e-9 for row in newton)
    assert (
        measured["published"]["worst_deviation_gain"] > 1000 * measured["published"]["worst_deviation_gain_of_newton"]
    )


def test_the_published_numerics_find_an_easy_equilibrium():
    """One mild principal and few tokens: eight iterations suffice, and both agree."""
    game = random_games("plain", num_rows=3, num_principals=1, num_tokens=3, value_scale=2.0, seed=1)
    solution = cage.solve(game)
    for row in range(3):
        offers = solve_as_published(game, row)
        policy = torch.softmax(game.base_logprobs[row] + offers.sum(0), -1)
        assert torch.allclose(policy, solution.policy[row], atol=1e-3)


def test_a_sweep_counts_what_is_not_solved():
    (wide, narrow) = sweep_cells(54, shapes=((2, 5),))
    assert wide["rows"] == narrow["rows"] == 54
    assert wide["unsolved"] == narrow["unsolved"] == wide["rows_with_nan"] == narrow["rows_with_nan"] == 0
    assert (wide["type"], narrow["type"]) == ("float64", "float32")
