"""Full vocabularies: tokens on the same side of every threshold are pooled, and the answers stay the same."""

import pytest
import torch

import cage
from cage.examples import random_games
from cage.newton import find_thresholds
from cage.normalization import measure, scale
from cage.pooling import BANDS, heaviest, pool, sum_by_distance, sum_by_side
from cage.response import respond
from cage.solution import SolutionBuilder
from jobs.bench.memory import measure_memory


def dense(game):
    """Solve with every token kept, whatever the size."""
    measures = measure(game)
    thresholds, num_steps = find_thresholds(scale(game, measures), aim=1e-11, max_steps=2000)
    builder = SolutionBuilder(game, measures)
    builder.set_thresholds(thresholds)
    return builder.build(num_steps, 1e-9)


@pytest.mark.parametrize("num_principals", [1, 2, 3, 5])
@pytest.mark.parametrize("num_kept", [8, 64])
def test_a_pooled_game_has_the_residuals_of_the_full_one(num_principals, num_kept):
    """Exactly at the thresholds where it was pooled, and around them until a pooled token changes sides."""
    game = random_games("arm-like", num_rows=6, num_principals=num_principals, num_tokens=300, value_scale=1.0)
    measures = measure(game)
    full = scale(game, measures)
    at = full.values.quantile(0.4, -1)
    pooled, kept = pool(game, measures, at, num_kept=num_kept)
    assert pooled.values.shape == (6, num_principals, num_kept + BANDS[num_principals] ** num_principals)
    assert kept.shape == (6, num_kept)
    distance = (full.values - at[..., None]).abs().amin(-1)
    for share in (0.0, 0.9, -0.9):
        near = at + share * distance
        expected, found = respond(full, near), respond(pooled, near)
        assert torch.allclose(found.log_residual, expected.log_residual, atol=1e-9)
        assert torch.allclose(found.jacobian, expected.jacobian, atol=1e-9)


@pytest.mark.parametrize("num_principals", [1, 2, 3, 6])
def test_pools_by_distance_refine_pools_by_side(num_principals):
    """Every band lies on one side, so the bands of a side add up to what splitting by side alone gives."""
    generator = torch.Generator().manual_seed(num_principals)
    weights = torch.rand(3, 500, generator=generator, dtype=torch.float64)
    excess = 5 * torch.randn(3, num_principals, 500, generator=generator, dtype=torch.float64)
    excess[..., :20] = 0.0
    excess[..., 20:30] *= 1e30
    fine_mass, fine_sums = sum_by_distance(weights, excess, torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64))
    mass, sums = sum_by_side(weights, excess)
    half = BANDS[num_principals] // 2
    for j in range(num_principals):
        outer = (3, -1, 2, half, (2 * half) ** (num_principals - 1 - j))
        pays = torch.arange(2**num_principals) >> j & 1 == 1
        on_a_side = fine_sums.reshape(3, num_principals, *outer[1:]).sum((2, 4, 5))
        assert torch.allclose(on_a_side[:, j, 1], sums[:, j, pays].sum(1))
        assert torch.allclose(on_a_side[:, j, 0], sums[:, j, ~pays].sum(1))
        paid_mass = weights[excess[:, j] > 0].sum()
        assert torch.allclose(mass[:, pays].sum(), paid_mass)
    assert torch.allclose(fine_mass.sum(1), mass.sum(1))


@pytest.mark.parametrize("num_tokens", [100, 4096, 20_011])
def test_the_heaviest_tokens_are_found(num_tokens):
    logits = torch.randn(4, num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    logits[2] = -torch.inf
    logits[2, num_tokens // 2 :] = 1.0
    found = heaviest(logits, 16)
    assert all(len(set(row)) == 16 for row in found.tolist())
    assert torch.equal(logits.gather(1, found).sort(1).values, logits.topk(16).values.sort(1).values)


@pytest.mark.parametrize("kind", ["plain", "arm-like", "peaked", "ties", "vetoes", "masked"])
@pytest.mark.parametrize("num_principals", [1, 2, 4])
@pytest.mark.parametrize("value_scale", [0.3, 3.0, 20.0])
def test_pooling_finds_what_the_dense_solver_finds(kind, num_principals, value_scale):
    game = random_games(
        kind, num_rows=3, num_principals=num_principals, num_tokens=4500, value_scale=value_scale, seed=1
    )
    solution, expected = cage.solve(game), dense(game)
    assert (solution.status == cage.Status.CONVERGED).all()
    assert torch.allclose(solution.policy, expected.policy, atol=1e-7)
    assert torch.allclose(solution.thresholds, expected.thresholds, atol=1e-6 * value_scale)


def test_the_answer_over_a_vocabulary_is_certified_over_every_token():
    game = random_games("arm-like", num_rows=2, num_principals=3, num_tokens=20_000, value_scale=2.0)
    solution = cage.solve(game)
    assert (solution.incentives.amax(1) > 0).sum(1).min() > 1000  # far more tokens are paid for than are kept
    assert cage.deviation_gain(game, solution).abs().max() < 1e-7


def test_float32_over_a_vocabulary_is_solved_to_its_tolerance():
    for value_scale in (0.5, 3.0, 10.0):
        game = random_games(
            "arm-like", num_rows=4, num_principals=2, num_tokens=30_000, value_scale=value_scale, dtype=torch.float32
        )
        solution = cage.solve(game)
        assert (solution.status == cage.Status.CONVERGED).all()
        wide = cage.Game(game.base_logprobs.double(), game.values.double(), 1.0)
        assert torch.allclose(solution.policy.double(), cage.solve(wide).policy, atol=1e-3)


def test_many_principals_over_a_vocabulary_are_solved_without_pools():
    game = random_games("plain", num_rows=1, num_principals=9, num_tokens=4200, value_scale=0.5)
    solution = cage.solve(game)
    assert solution.status.tolist() == [cage.Status.CONVERGED]
    assert cage.deviation_gain(game, solution).abs().max() < 1e-7


@pytest.mark.slow
def test_no_copies_of_the_values_pile_up():
    """151,936 tokens, 64 rows, 4 principals: the policy that is returned and one block of rows, no more."""
    measured = measure_memory()
    assert measured["converged"] == 1.0
    assert measured["policy_mib"] < measured["peak_mib"] < 0.3 * measured["input_mib"]
