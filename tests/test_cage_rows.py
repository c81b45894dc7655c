"""A row's answer has the same bits in every batch that it is solved in (one thread, on a CPU)."""

import ast
from pathlib import Path

import pytest
import torch

import cage
from cage import RuleName, rules
from cage.direct import ELEMENTS_PER_BATCH
from cage.examples import random_games
from cage.normalization import ELEMENTS_PER_BLOCK
from cage.rows import STEPS_PER_CHECK
from pipeline.worker.whole_vectors import SENSITIVE

MIX = (("arm-like", 3.0), ("plain", 30.0), ("masked", 1.0), ("ties", 0.1))
PARTS = ("log_policy", "thresholds", "utilities", "residual", "status", "num_steps")
SHAPES = [(1, 50), (2, 3), (2, 50), (3, 50), (5, 17), (8, 50), (2, 1000), (1, 5000), (2, 5000), (3, 5000)]


def taken(game, rows):
    temperature = game.agent_temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[rows]
    return cage.Game(game.base_logprobs[rows], game.values[rows], temperature)


def mixed_games(num_rows, num_principals, num_tokens, dtype):
    """Easy and hard rows side by side, each with its own temperature: they end at different steps."""
    parts = [
        random_games(
            kind, num_rows=num_rows, num_principals=num_principals, num_tokens=num_tokens, value_scale=value_scale,
            seed=seed, dtype=dtype,
        )
        for seed, (kind, value_scale) in enumerate(MIX)
    ]  # fmt: skip
    order = torch.randperm(4 * num_rows, generator=torch.Generator().manual_seed(5))
    base = torch.cat([part.base_logprobs for part in parts])[order]
    values = torch.cat([part.values for part in parts])[order]
    temperature = 0.5 + torch.rand(4 * num_rows, generator=torch.Generator().manual_seed(6), dtype=dtype)
    return cage.Game(base, values, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_principals", "num_tokens"), SHAPES)
def test_a_row_s_bits_do_not_depend_on_its_batch(num_principals, num_tokens, dtype):
    game = mixed_games(3 if num_tokens > 1000 else 9, num_principals, num_tokens, dtype)
    together = cage.solve(game)
    num_rows = game.num_rows
    generator = torch.Generator().manual_seed(7)
    for size in (1, 2, 3, 5, 8, num_rows - 1, num_rows):
        rows = torch.randperm(num_rows, generator=generator)[:size]
        some = cage.solve(taken(game, rows))
        for part in PARTS:
            assert torch.equal(getattr(some, part), getattr(together, part)[rows]), (part, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RuleName)
@pytest.mark.parametrize(
    ("num_principals", "num_tokens"), [(2, 50), pytest.param(3, 50, marks=pytest.mark.nightly), (3, 51), (2, 5000)]
)
def test_a_rule_s_decision_does_not_depend_on_the_batch(name, num_principals, num_tokens, dtype):
    game = mixed_games(3, num_principals, num_tokens, dtype)
    weights = torch.rand(game.num_rows, num_principals, generator=torch.Generator().manual_seed(0))
    together = rules.by_name[name](game, weights)
    for size in (1, 2, 5, 7):
        rows = torch.randperm(game.num_rows, generator=torch.Generator().manual_seed(size))[:size]
        some = rules.by_name[name](taken(game, rows), weights[rows])
        assert torch.equal(some.log_policy, together.log_policy[rows])
        assert torch.equal(some.residual, together.residual[rows])


def test_no_function_is_used_whose_bits_depend_on_a_number_s_place():
    # their last numbers, which fill no vector of the processor, are computed by other code
    names = {each.__name__.strip("_") for each in SENSITIVE} | {"logaddexp", "logaddexp2", "sigmoid_", "expit"}
    for file in Path(cage.__file__).parent.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        used = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
        assert not used & names, (file.name, used & names)


def test_a_batch_that_is_solved_in_parts_has_the_answers_of_its_rows(monkeypatch):
    game = mixed_games(9, 2, 50, torch.float64)
    together = cage.solve(game)
    monkeypatch.setitem(ELEMENTS_PER_BATCH, "cpu", 7 * 2 * 50)
    monkeypatch.setitem(ELEMENTS_PER_BLOCK, "cpu", 3 * 50)
    parts = cage.solve(game)
    for part in PARTS:
        assert torch.equal(getattr(parts, part), getattr(together, part)), part


@pytest.mark.parametrize("method", [cage.Jacobi(max_steps=20), cage.GaussSeidel(max_steps=20)])
def test_sweeps_do_not_depend_on_the_batch_either(method):
    game = mixed_games(5, 3, 20, torch.float64)
    together = method.solve(game)
    for row in range(game.num_rows):
        alone = method.solve(taken(game, torch.tensor([row])))
        assert torch.equal(alone.thresholds[0], together.thresholds[row])


def test_checking_for_finished_rows_more_rarely_changes_nothing(monkeypatch):
    """As on a GPU, where rows that are done wait for the next check."""
    game = mixed_games(5, 3, 20, torch.float64)
    often = cage.solve(game)
    monkeypatch.setitem(STEPS_PER_CHECK, "cpu", 8)
    rarely = cage.solve(game)
    for part in PARTS:
        assert torch.equal(getattr(often, part), getattr(rarely, part)), part
