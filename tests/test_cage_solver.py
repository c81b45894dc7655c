"""What the methods promise: every row is solved or its status says why not, and no row affects another."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cage
from cage import maximin
from cage.examples import kinds, random_games
from cage.newton import find_thresholds
from cage.normalization import measure, scale
from cage.response import newton, respond
from cage.solution import SolutionBuilder

SCALES = (0.1, 3.0, 100.0)
SHAPES = [(1, 2), (2, 2), (8, 2), (2, 50), (3, 50), (8, 50), (2, 1000), (4, 1000)]


@pytest.mark.slow
@pytest.mark.parametrize(("num_principals", "num_tokens"), SHAPES)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_random_games_of_every_kind_are_solved(num_principals, num_tokens, dtype, tol):
    """10,000 games a cell: `cage bench solver --sweep 10000`."""
    for seed, kind in enumerate(kinds):
        for value_scale in SCALES:
            game = random_games(
                kind, num_rows=8, num_principals=num_principals, num_tokens=num_tokens, value_scale=value_scale,
                seed=seed, dtype=dtype,
            )  # fmt: skip
            solution = cage.ThresholdNewton(tol=tol).solve(game)
            assert (solution.status == cage.Status.CONVERGED).all(), (kind, value_scale)
            assert solution.residual.max() <= tol
            for part in (solution.policy, solution.thresholds, solution.utilities, solution.incentives):
                assert not torch.isnan(part).any(), (kind, value_scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["base", "values"])
@pytest.mark.parametrize(("num_principals", "num_tokens"), [(2, 20), (3, 20), (2, 5000)])
def test_a_row_that_is_not_finite_is_reported_and_leaves_its_neighbours_alone(bad, place, num_principals, num_tokens):
    game = random_games("arm-like", num_rows=5, num_principals=num_principals, num_tokens=num_tokens, value_scale=2.0)
    base, values = game.base_logprobs.clone(), game.values.clone()
    if place == "values":
        values[2, 1, 3] = bad
    elif bad == -torch.inf:
        base[2] = bad
    else:
        base[2, 3] = bad
    clean, spoilt = cage.solve(game), cage.solve(cage.Game(base, values, 1.0))
    others = torch.tensor([0, 1, 3, 4])
    assert spoilt.status.tolist() == [0, 0, cage.Status.NOT_FINITE, 0, 0]
    for name in ("log_policy", "thresholds", "utilities", "residual", "status", "num_steps"):
        assert torch.equal(getattr(spoilt, name)[others], getattr(clean, name)[others]), name
    assert torch.isnan(spoilt.log_policy[2]).all()
    assert torch.isnan(spoilt.thresholds[2]).all()
    assert torch.isnan(spoilt.residual[2])


@pytest.mark.parametrize("num_tokens", [6, 5000])
@pytest.mark.parametrize("ignored", [7.0, -torch.inf, 1e30])
def test_values_of_tokens_that_cannot_be_drawn_are_ignored(num_tokens, ignored):
    game = random_games("plain", num_rows=3, num_principals=2, num_tokens=num_tokens, value_scale=3.0)
    more = cage.Game(
        torch.cat([game.base_logprobs, torch.full((3, 2), -torch.inf, dtype=torch.float64)], 1),
        torch.cat([game.values, torch.full((3, 2, 2), ignored, dtype=torch.float64)], 2),
        1.0,
    )
    solution, with_more = cage.solve(game), cage.solve(more)
    assert torch.allclose(solution.thresholds, with_more.thresholds, atol=1e-8)
    assert (with_more.policy[:, -2:] == 0).all()
    assert (with_more.incentives[..., -2:] == 0).all()
    assert cage.deviation_gain(more, with_more).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e20, 1e37])
def test_finite_numbers_of_any_size_give_no_nan(dtype, size):
    for kind in kinds:
        game = random_games(kind, num_rows=6, num_principals=3, num_tokens=9, value_scale=size, dtype=dtype)
        for temperature in (1e-6, 1.0, 1e20):
            solution = cage.ThresholdNewton(max_steps=60).solve(
                cage.Game(game.base_logprobs, game.values, temperature)
            )
            assert not torch.isnan(solution.log_policy).any()
            assert torch.allclose(solution.policy.sum(1), torch.ones(6, dtype=dtype), atol=1e-4)


def test_a_base_far_from_normalised_is_normalised():
    game = random_games("plain", num_rows=3, num_principals=2, num_tokens=8, value_scale=2.0)
    shifted = cage.Game(game.base_logprobs + 500.0, game.values, 1.0)
    assert torch.allclose(cage.solve(shifted).policy, cage.solve(game).policy, atol=1e-8)


@pytest.mark.parametrize("method", [cage.ThresholdNewton(max_steps=1), cage.Jacobi(max_steps=1)])
def test_too_few_steps_are_reported_not_hidden(method):
    game = random_games("plain", num_rows=10, num_principals=3, num_tokens=20, value_scale=10.0)
    solution = method.solve(game)
    assert (solution.status == cage.Status.MAX_STEPS).any()
    assert ((solution.residual > 1e-9) == (solution.status == cage.Status.MAX_STEPS)).all()
    assert torch.isfinite(solution.policy).all()


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-11])
def test_a_tolerance_is_kept(tol):
    game = random_games("plain", num_rows=50, num_principals=2, num_tokens=20, value_scale=3.0)
    assert cage.ThresholdNewton(tol=tol).solve(game).residual.max() <= tol


def test_a_long_path_is_followed_to_its_end():
    """Eight principals with values of up to 3,000 agent temperatures: some paths take hundreds of steps."""
    game = random_games("arm-like", num_rows=20, num_principals=8, num_tokens=2, value_scale=100.0, seed=23)
    solution = cage.solve(game)
    assert (solution.status == cage.Status.CONVERGED).all()
    assert solution.num_steps.max() > 200


@pytest.mark.parametrize(
    ("kind", "principals", "tokens", "seed", "row"),
    [("flat", 7, 50, 17, 177), ("arm-like", 8, 50, 23, 10), ("peaked", 5, 1000, 11, 77), ("flat", 8, 1000, 17, 95)],
)
def test_a_path_that_the_first_tolerance_loses_is_followed_with_a_tighter_one(kind, principals, tokens, seed, row):
    games = random_games(
        kind, num_rows=186, num_principals=principals, num_tokens=tokens, value_scale=100.0, seed=seed
    )
    game = cage.Game(games.base_logprobs[row : row + 1], games.values[row : row + 1], 1.0)
    solution = cage.solve(game)
    assert solution.status == cage.Status.CONVERGED
    assert solution.num_steps > 1000


def test_a_last_step_across_a_corner_is_noticed_and_finished():
    """The last step is not checked; where a token changed sides in it, the answer's residual shows it."""
    game = random_games("arm-like", num_rows=256, num_principals=2, num_tokens=50, value_scale=3.0)
    measures = measure(game)
    thresholds, num_steps = find_thresholds(scale(game, measures), aim=5e-10, max_steps=2000)
    builder = SolutionBuilder(game, measures)
    builder.set_thresholds(thresholds)
    late = builder.residual > 1e-9
    assert 0 < late.sum() < 10
    solution = cage.solve(game)
    assert solution.residual.max() <= 1e-9
    assert torch.equal(solution.num_steps > num_steps, late)


@pytest.mark.parametrize("num_principals", [1, 2])
@pytest.mark.parametrize("value_scale", [0.5, 3.0, 30.0])
def test_the_short_forms_of_a_newton_step_are_the_general_one(num_principals, value_scale):
    game = random_games(
        "arm-like", num_rows=40, num_principals=num_principals, num_tokens=30, value_scale=value_scale
    )
    scaled = scale(game, measure(game))
    share = torch.rand(40, num_principals, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = 0.3 * share * scaled.values.amin(-1)
    response = respond(scaled, at)
    log_residual, step = newton(scaled, at)
    assert torch.allclose(log_residual, response.log_residual)
    expected = torch.linalg.solve(response.jacobian, -response.log_residual)
    assert torch.allclose(step, expected, rtol=1e-6)


@pytest.mark.parametrize("num_principals", [1, 2, 3])
def test_the_three_methods_agree(num_principals):
    game = random_games("arm-like", num_rows=40, num_principals=num_principals, num_tokens=30, value_scale=1.0)
    newton = cage.ThresholdNewton().solve(game)
    for method in (cage.Jacobi(), cage.GaussSeidel()):
        swept = method.solve(game)
        settled = swept.status == cage.Status.CONVERGED
        assert settled.double().mean() > 0.9
        assert torch.allclose(swept.policy[settled], newton.policy[settled], atol=1e-6)


def test_one_principal_settles_in_one_sweep():
    game = random_games("plain", num_rows=30, num_principals=1, num_tokens=30, value_scale=10.0)
    assert cage.Jacobi().solve(game).num_steps.max() == 1


def test_the_certificate_sees_an_offer_that_is_not_optimal():
    game = random_games("plain", num_rows=10, num_principals=2, num_tokens=10, value_scale=5.0)
    early = cage.Jacobi(max_steps=1).solve(game)
    off = early.residual > 1e-3
    assert off.any()
    assert (cage.deviation_gain(game, early)[off].amax(1) > 1e-6).all()


class NoReadingBack(TorchDispatchMode):
    """Refuse every operation that would make the host wait for a device."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique", "_to_copy")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        to_host = name != "_to_copy" or "device" in (kwargs or {})
        assert name not in self.REFUSED or not to_host, f"{name} in a step"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_principals", [1, 2, 4])
def test_a_step_reads_nothing_back_from_the_device(num_principals):
    """FixedStepNewton takes the steps of both solvers: Newton's for 1 and 2 principals, the path's for more."""
    game = random_games("arm-like", num_rows=6, num_principals=num_principals, num_tokens=20, value_scale=3.0)
    measures = measure(game)
    scaled = scale(game, measures)
    with NoReadingBack():
        fixed = cage.FixedStepNewton(4).solve(game)
        interior = maximin.start(scaled, measures.best)
        for _ in range(3):
            interior = maximin.advance(scaled, interior, tol=1e-9)
    assert (fixed.num_steps > 0).all()
    with pytest.raises(AssertionError, match="in a step"), NoReadingBack():
        bool(fixed.policy.any())
