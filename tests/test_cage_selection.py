"""How many equilibria there are, and which one is meant."""

import pytest
import torch

import cage
from cage.continuation import follow_path
from cage.examples import random_games
from cage.newton import find_thresholds
from cage.normalization import measure, scale
from cage.response import respond


def free_riders(x):
    """Three principals like every token but one each; one with much mass, three with little."""
    values = torch.full((1, 3, 4), float(x), dtype=torch.float64)
    values[..., 0] = 0.0
    for j in range(3):
        values[0, j, j + 1] = -10.0
    weights = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    base = weights.log() - torch.tensor([0.0, 2.0 * x, 2.0 * x, 2.0 * x], dtype=torch.float64)
    return cage.Game(base[None], values, 1.0)


def residual_at(game, thresholds):
    scaled, measures = scale(game, measure(game)), measure(game)
    at = (thresholds - measures.best) / measures.temperature[:, None]
    return (respond(scaled, at).log_residual.exp() - 1).abs().max().item()


def test_three_principals_can_have_two_equilibria():
    game = free_riders(1)
    everyone_pays = torch.zeros(1, 3, dtype=torch.float64)
    assert residual_at(game, everyone_pays) < 1e-12
    solution = cage.solve(game)
    assert solution.policy[0].tolist() == pytest.approx([0.9136, 0.0288, 0.0288, 0.0288], abs=5e-5)
    assert solution.thresholds[0].tolist() == pytest.approx([0.755] * 3, abs=5e-4)
    assert residual_at(game, solution.thresholds) < 1e-9


def test_jacobi_finds_the_other_equilibrium_from_drawn_starts():
    solutions = [cage.Jacobi(start_seed=seed, max_steps=60).solve(free_riders(1)) for seed in range(8)]
    settled = [each for each in solutions if each.status.item() == cage.Status.CONVERGED]
    ends = {round(each.policy[0, 0].item(), 3) for each in settled}
    assert ends == {0.7, 0.914}
    again = cage.Jacobi(start_seed=0, max_steps=60).solve(free_riders(1))
    assert torch.equal(again.thresholds, solutions[0].thresholds)


@pytest.mark.parametrize("x", [1.0, 2.0, 4.0])
def test_the_equilibrium_of_least_intervention_is_returned(x):
    solution = cage.solve(free_riders(x))
    assert (solution.thresholds > 0.5).all()
    assert solution.policy[0, 0] > 0.9


def test_an_equilibrium_with_negative_determinant_is_never_returned():
    """With x = 4 everybody paying is an equilibrium too, but the path from nobody paying never arrives there."""
    game = free_riders(4)
    jacobian = respond(scale(game, measure(game)), torch.full((1, 3), -4.0, dtype=torch.float64)).jacobian
    assert torch.linalg.det(jacobian).item() == pytest.approx(-1.94, abs=0.01)
    assert cage.solve(game).policy[0, 0] > 0.9


@pytest.mark.parametrize("kind", ["plain", "arm-like", "vetoes", "common interest"])
@pytest.mark.parametrize("value_scale", [1.0, 5.0])
def test_one_or_two_principals_have_one_equilibrium(kind, value_scale):
    """Newton from many starts, and every sweep that settles, ends where the default does."""
    generator = torch.Generator().manual_seed(1)
    game = random_games(kind, num_rows=20, num_principals=2, num_tokens=12, value_scale=value_scale, seed=2)
    scaled, solution = scale(game, measure(game)), cage.solve(game)
    arrived = 0
    for _ in range(20):
        share = torch.rand(20, 2, generator=generator, dtype=torch.float64)
        start = scaled.values.amin(-1) * share + (1 - share)
        found, _ = find_thresholds(scaled, start, aim=1e-10, max_steps=20)
        there = respond(scaled, found).log_residual.abs().amax(1) < 1e-9
        arrived += int(there.sum())
        thresholds = measure(game).thresholds(found)
        assert torch.allclose(thresholds[there], solution.thresholds[there], atol=1e-6)
    assert arrived > 100
    for method in (cage.Jacobi(), cage.GaussSeidel()):
        swept = method.solve(game)
        settled = swept.status == cage.Status.CONVERGED
        assert settled.any()
        assert torch.allclose(swept.thresholds[settled], solution.thresholds[settled], atol=1e-6)


@pytest.mark.parametrize(
    "method", [cage.Jacobi(tol=1e-8, max_steps=3000), cage.GaussSeidel(tol=1e-8, max_steps=3000)]
)
def test_sweeps_of_two_principals_contract(method):
    """They always settle, if slowly; the default method does not wait for them."""
    for kind in ("arm-like", "vetoes", "common interest"):
        game = random_games(kind, num_rows=40, num_principals=2, num_tokens=12, value_scale=3.0, seed=1)
        swept = method.solve(game)
        assert (swept.status == cage.Status.CONVERGED).all()
        assert torch.allclose(swept.policy, cage.solve(game).policy, atol=1e-5)


def test_at_two_principals_equilibrium_the_determinant_is_positive_and_crossings_are_small():
    """The diagonal is 1 and the rest within (-1, 1): the reason why there is one equilibrium."""
    for seed, value_scale in enumerate([0.5, 2.0, 8.0, 30.0]):
        game = random_games(
            "arm-like", num_rows=100, num_principals=2, num_tokens=30, value_scale=value_scale, seed=seed
        )
        measures = measure(game)
        at = (cage.solve(game).thresholds - measures.best) / measures.temperature[:, None]
        jacobian = respond(scale(game, measures), at).jacobian
        assert torch.allclose(jacobian.diagonal(dim1=1, dim2=2), torch.ones(100, 2, dtype=torch.float64), atol=1e-6)
        assert jacobian[:, 0, 1].abs().max() < 1
        assert jacobian[:, 1, 0].abs().max() < 1
        assert (torch.linalg.det(jacobian) > 0).all()


def test_the_jacobian_is_the_derivative_of_the_residuals():
    game = random_games("plain", num_rows=30, num_principals=4, num_tokens=20, value_scale=2.0)
    scaled = scale(game, measure(game))
    at = -2 * torch.rand(30, 4, dtype=torch.float64)
    response = respond(scaled, at, with_drift=True)
    step = 1e-7
    for k in range(4):
        ahead = at.clone()
        ahead[:, k] += step
        slope = (respond(scaled, ahead).log_residual - response.log_residual) / step
        assert torch.allclose(slope, response.jacobian[:, :, k], atol=1e-5)
    grown = type(scaled)(scaled.log_base, scaled.values * (1 + step))
    slope = (respond(grown, at).log_residual - response.log_residual) / step
    assert torch.allclose(slope, response.drift, atol=1e-4)


def careful_path(game, num_points=400):
    """Follow the path in small steps of the temperature, by Newton alone; return also where it never turned back."""
    scaled, measures = scale(game, measure(game)), measure(game)
    spread = (1 - measures.no_offer_thresholds).amax(1).clamp(min=1)
    at = 1 - (1 - measures.no_offer_thresholds) / spread[:, None]
    smooth = torch.ones_like(spread, dtype=torch.bool)
    for i in range(1, num_points + 1):
        grown = type(scaled)(scaled.log_base, scaled.values * (spread ** (i / num_points - 1))[:, None, None])
        for _ in range(8):
            response = respond(grown, at)
            step = torch.linalg.solve(response.jacobian, response.log_residual).nan_to_num(0, 0, 0)
            at = at - step.clamp(-0.3, 0.3)
        smooth &= respond(grown, at).log_residual.abs().amax(1) < 1e-9
        smooth &= torch.linalg.det(respond(grown, at).jacobian) > 0
    return measures.thresholds(at), smooth


@pytest.mark.slow
@pytest.mark.parametrize("num_principals", [3, 5])
def test_the_answer_is_the_one_that_small_steps_lead_to(num_principals):
    game = random_games("vetoes", num_rows=150, num_principals=num_principals, num_tokens=12, value_scale=5.0, seed=3)
    thresholds, smooth = careful_path(game)
    assert smooth.double().mean() > 0.8
    assert torch.allclose(cage.solve(game).thresholds[smooth], thresholds[smooth], atol=1e-6)


@pytest.mark.slow
def test_where_the_path_turns_back_it_is_followed_round():
    """Games whose branch from nobody paying ends before their temperature: the answer lies beyond two turns."""
    game = random_games("vetoes", num_rows=200, num_principals=8, num_tokens=50, value_scale=30.0, seed=1)
    scaled = scale(game, measure(game))
    _, smooth = careful_path(game, num_points=80)
    turned = (~smooth).nonzero()[:, 0]
    assert turned.shape[0] > 0
    found, _ = follow_path(scaled.rows(turned), residual_tol=1e-6, max_steps=4000)
    response = respond(scaled.rows(turned), found)
    assert response.log_residual.abs().max() < 1e-9
    assert (torch.linalg.det(response.jacobian) > 0).all()
