"""Newton with a fixed number of steps, as captured CUDA graphs take it: the answers of the solver that checks."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch

import cage
from cage import newton
from cage.elimination import eliminate, eliminate_by_entries


@pytest.mark.parametrize("num_principals", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fixed_step_newton_finds_the_same_equilibrium(num_principals, dtype):
    torch.manual_seed(3)
    game = cage.Game(torch.randn(40, 60, dtype=dtype) * 2, torch.randn(40, num_principals, 60, dtype=dtype) * 4, 0.7)
    fixed, checked = cage.FixedStepNewton(64).solve(game), cage.solve(game)
    assert (fixed.status == cage.Status.CONVERGED).all()
    torch.testing.assert_close(fixed.policy, checked.policy, atol=1e-9 if dtype is torch.float64 else 1e-6, rtol=0)
    few = cage.FixedStepNewton(2).solve(game)
    assert (few.status == cage.Status.MAX_STEPS).any() == bool(num_principals)


@pytest.mark.parametrize(
    "num_principals", [2, 4, *[pytest.param(number, marks=pytest.mark.nightly) for number in (3, 6)]]
)
def test_fixed_step_newton_compiles_as_a_whole(num_principals, monkeypatch):
    """Traced without a break, and with the system of equations solved entry by entry."""
    traced = partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(newton, "_compiled", functools.cache(lambda function, fusion: traced(function)))
    torch.manual_seed(5)
    game = cage.Game(
        torch.randn(20, 50, dtype=torch.float64) * 2, torch.randn(20, num_principals, 50, dtype=torch.float64), 0.2
    )
    torch._dynamo.utils.counters.clear()
    compiled, plain = (cage.FixedStepNewton(40, compiles=compiles).solve(game) for compiles in (True, False))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # to begin, to step, to end
    torch._dynamo.reset()
    assert torch.equal(compiled.status, plain.status)
    torch.testing.assert_close(compiled.policy, plain.policy, atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, when it is imported
@pytest.mark.parametrize("num_principals", [2, 3, 6])
def test_the_compiler_knows_the_options_it_is_given(num_principals):
    game = cage.Game(torch.zeros(1, 2), torch.zeros(1, num_principals, 2), 1.0)
    options = dict(newton._fusion(game))
    assert bool(options) == (num_principals > 2)
    torch.compile(torch.sin, options=options)  # refused at once if not


@pytest.mark.parametrize("num_principals", [2, 4])
@pytest.mark.parametrize("agent_temperature", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [6, 9, 12, 20])
def test_more_steps_change_no_bit_of_what_fewer_solved(num_steps, agent_temperature, num_principals):
    torch.manual_seed(4)
    base = torch.randn(400, 50, dtype=torch.float64) * 2
    game = cage.Game(base, torch.randn(400, num_principals, 50, dtype=torch.float64), agent_temperature)
    few, many = cage.FixedStepNewton(num_steps).solve(game), cage.FixedStepNewton(60).solve(game)
    solved = few.status == cage.Status.CONVERGED
    for name in ("log_policy", "thresholds", "residual", "num_steps"):
        assert torch.equal(getattr(few, name)[solved], getattr(many, name)[solved])


@pytest.mark.parametrize("num_principals", [2, 3])
def test_fixed_step_newton_masks_what_cannot_be_drawn_and_reports_what_is_not_finite(num_principals):
    base = torch.zeros(3, 5, dtype=torch.float64)
    base[0, 2] = -torch.inf
    values = torch.randn(3, num_principals, 5, dtype=torch.float64)
    values[0, :, 2] = torch.nan
    values[1, 0, 1] = torch.inf
    game = cage.Game(base, values, 0.5)
    fixed, checked = cage.FixedStepNewton(40).solve(game), cage.solve(game)
    assert fixed.status.tolist() == checked.status.tolist()
    torch.testing.assert_close(fixed.policy, checked.policy, equal_nan=True, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_unknowns", [3, 4, 8])
def test_elimination_by_entries_gives_the_bits_of_elimination(num_unknowns):
    torch.manual_seed(6)
    matrix = torch.randn(60, num_unknowns, num_unknowns, dtype=torch.float64)
    matrix[0, 1] = matrix[0, 0]  # singular
    matrix[3, 0, 0], matrix[3, 1, 0] = 9.0, -9.0  # as large, of another sign
    matrix[4, :, 1] = 0.0
    matrix[1, 0, 0] = 0.0
    matrix[2, 1, 1] = torch.nan
    right = torch.randn(60, num_unknowns, 2, dtype=torch.float64)
    for one, other in zip(eliminate(matrix, right), eliminate_by_entries(matrix, right), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
