"""The theory of the game as tests: known answers, and what holds at every equilibrium (docs/mathematics.md)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cage
from cage.examples import kinds, random_games

games = st.builds(
    random_games,
    st.sampled_from([kind for kind in kinds if kind != "masked"]),
    num_rows=st.just(4),
    num_principals=st.integers(1, 5),
    num_tokens=st.sampled_from([2, 3, 7, 50]),
    value_scale=st.sampled_from([0.3, 1.0, 3.0, 10.0, 30.0]),
    seed=st.integers(0, 10_000),
)
mild_games = st.builds(
    random_games,
    st.sampled_from(["plain", "peaked", "flat", "arm-like"]),
    num_rows=st.just(4),
    num_principals=st.integers(1, 2),
    num_tokens=st.sampled_from([2, 7, 50]),
    value_scale=st.sampled_from([0.3, 1.0, 3.0, 10.0]),
    seed=st.integers(0, 10_000),
)
some = settings(max_examples=25, deadline=None, derandomize=True)


def solved(game):
    solution = cage.ThresholdNewton().solve(game)
    assert (solution.status == cage.Status.CONVERGED).all()
    return solution


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("height", [2.5, 8.0, 80.0])
def test_two_equal_opponents_cancel_out(temperature, height):
    worth = height * temperature
    solution = solved(cage.Game(tensor([[0.5, 0.5]]).log(), tensor([[[worth, 0.0], [0.0, worth]]]), temperature))
    assert torch.allclose(solution.thresholds, tensor([[2 * temperature, 2 * temperature]]))
    assert torch.allclose(solution.policy, tensor([[0.5, 0.5]]))
    assert torch.allclose(
        solution.incentives, tensor([[[worth - 2 * temperature, 0.0], [0.0, worth - 2 * temperature]]])
    )


@pytest.mark.parametrize("difference", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_the_stronger_of_two_opponents_shades_its_bid(difference, temperature):
    high, low = 20.0 + difference, 20.0
    game = cage.Game(
        tensor([[0.0, 0.0]]), tensor([[[high * temperature, 0.0], [0.0, low * temperature]]]), temperature
    )
    solution = solved(game)
    p = solution.policy[0, 0].item()
    assert math.log(p / (1 - p)) + 1 / (1 - p) - 1 / p == pytest.approx(difference, abs=1e-8)
    assert solution.thresholds[0].tolist() == pytest.approx([temperature / (1 - p), temperature / p])
    if difference == 5.0:  # where a weighted sum gives 0.993
        assert p == pytest.approx(0.796, abs=5e-4)
        assert cage.rules.linear(game).log_policy[0, 0].exp().item() == pytest.approx(0.993, abs=5e-4)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("height", [12.0, 40.0])
def test_one_principal_and_two_tokens(share, height):
    temperature = 0.5
    game = cage.Game(tensor([[1 - share, share]]).log(), tensor([[[0.0, height * temperature]]]), temperature)
    solution = solved(game)
    p = solution.policy[0, 1].item()
    assert solution.thresholds.item() == pytest.approx(temperature / (1 - p))
    assert math.log(p / (1 - p)) == pytest.approx(math.log(share / (1 - share)) + height - 1 / (1 - p))


@some
@given(mild_games, st.sampled_from([1.0, 1.5, 20.0]))
def test_nobody_pays_an_agent_dearer_than_every_spread(game, factor):
    spread = (game.values.amax(-1) - game.values.amin(-1)).amax(1)
    solution = solved(cage.Game(game.base_logprobs, game.values, spread * factor))
    base = torch.softmax(game.base_logprobs, -1)
    assert torch.allclose(solution.policy, base)
    assert torch.allclose(solution.incentives, torch.zeros_like(game.values), atol=1e-9)
    expected = (base[:, None] * game.values).sum(-1) + (spread * factor)[:, None]
    assert torch.allclose(solution.thresholds, expected)


@some
@given(games)
def test_thresholds_satisfy_the_defining_equations(game):
    """log pi = log pi0 + sum_j max(v_j - c_j, 0) / tau - log Z and E_pi[max(c_j - v_j, 0)] = tau, anew."""
    solution = solved(game)
    offers = (game.values - solution.thresholds[..., None]).clamp(min=0)
    policy = torch.softmax(game.base_logprobs + offers.sum(1) / game.agent_temperature, -1)
    assert torch.allclose(policy, solution.policy, atol=1e-9)
    slack = (policy[:, None] * (solution.thresholds[..., None] - game.values).clamp(min=0)).sum(-1)
    assert torch.allclose(slack, torch.full_like(slack, game.agent_temperature), atol=1e-6)
    utilities = (policy[:, None] * (game.values - offers)).sum(-1)
    assert torch.allclose(utilities, solution.utilities, atol=1e-6)
    assert torch.allclose(solution.thresholds, game.agent_temperature + utilities, atol=1e-6)


@some
@given(games)
def test_no_principal_gains_by_deviating(game):
    gain = cage.deviation_gain(game, solved(game))
    assert gain.abs().max() < 1e-7


@some
@given(games)
def test_the_paper_s_side_constraints_are_slack(game):
    solution = solved(game)
    room = game.values - game.values.amin(-1, keepdim=True) - solution.incentives
    assert room.min() >= -1e-9
    surplus = torch.logsumexp(torch.log_softmax(game.base_logprobs, -1) + solution.incentives.sum(1), -1)
    assert surplus.min() >= -1e-12


@some
@given(mild_games, st.sampled_from([-40.0, 0.7, 1e4]))
def test_a_constant_added_to_the_values_moves_the_threshold_alone(game, constant):
    solution, moved = solved(game), solved(cage.Game(game.base_logprobs, game.values + constant, 1.0))
    assert torch.allclose(moved.thresholds, solution.thresholds + constant, atol=1e-6)
    assert torch.allclose(moved.policy, solution.policy, atol=1e-6)
    assert torch.allclose(moved.incentives, solution.incentives, atol=1e-6)


@some
@given(mild_games, st.sampled_from([1e-3, 7.0]))
def test_only_values_in_agent_temperatures_matter(game, unit):
    solution, scaled = solved(game), solved(cage.Game(game.base_logprobs, game.values * unit, unit))
    assert torch.allclose(scaled.policy, solution.policy, atol=1e-7)
    assert torch.allclose(scaled.thresholds, solution.thresholds * unit, rtol=1e-6)


@some
@given(games)
def test_a_principal_without_preferences_is_absent(game):
    nothing = torch.full_like(game.values[:, :1], 3.0)
    joined = cage.Game(game.base_logprobs, torch.cat([game.values, nothing], 1), game.agent_temperature)
    alone, together = solved(game), solved(joined)
    assert together.incentives[:, -1].abs().max() < 1e-9
    assert torch.allclose(alone.policy, together.policy, atol=1e-6)


@some
@given(games)
def test_a_principal_offers_nothing_exactly_if_entry_costs_more_than_it_wins(game):
    """Offering pays if max v - E_pi'[v] > tau, with pi' the policy without it."""
    solution = solved(game)
    for j in range(game.num_principals):
        others = solution.incentives.sum(1) - solution.incentives[:, j]
        without = torch.softmax(game.base_logprobs + others, -1)
        wins = game.values[:, j].amax(-1) - (without * game.values[:, j]).sum(-1) - game.agent_temperature
        pays = solution.incentives[:, j].amax(-1)
        assert (pays[wins <= 0] < 1e-6).all()
        assert (pays[wins > 1e-4] > 0).all()


@some
@given(mild_games)
def test_splitting_a_token_in_two_equal_ones_changes_nothing(game):
    split = cage.Game(
        torch.cat([game.base_logprobs, game.base_logprobs], 1), torch.cat([game.values, game.values], 2), 1.0
    )
    solution, twice = solved(game), solved(split)
    assert torch.allclose(solution.thresholds, twice.thresholds, atol=1e-6)
    assert torch.allclose(2 * twice.policy[:, : game.num_tokens], solution.policy, atol=1e-7)


@pytest.mark.parametrize("num_principals", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_identical_principals_maximise_a_concave_objective(num_principals, seed):
    """J pi.v - tau KL(pi || pi0) - J tau max_a log(pi0 / pi), by an optimiser that knows nothing of thresholds."""
    import numpy as np
    from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize

    generator = torch.Generator().manual_seed(seed)
    base = torch.softmax(torch.randn(1, 4, generator=generator, dtype=torch.float64), -1)
    value = 3 * torch.randn(1, 1, 4, generator=generator, dtype=torch.float64)
    policy = solved(cage.Game(base.log(), value.expand(1, num_principals, 4), 1.0)).policy[0].numpy()
    pi0, v = base[0].numpy(), value[0, 0].numpy()

    def loss(x):
        return -(num_principals * x[:4] @ v - x[:4] @ np.log(x[:4] / pi0) - num_principals * x[4])

    found = minimize(
        loss,
        np.append(pi0, 0.0),
        method="SLSQP",
        bounds=[(1e-12, 1.0)] * 4 + [(None, None)],
        constraints=[
            LinearConstraint(np.append(np.ones(4), 0.0), 1.0, 1.0),
            NonlinearConstraint(lambda x: x[4] - np.log(pi0 / x[:4]), 0.0, np.inf),
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert np.allclose(found.x[:4], policy, atol=1e-5)


def test_opposed_principals_maximise_no_planner_s_objective():
    """A planner who weighs both sides' values alike lands on 0.993; bids land on 0.796 (see above)."""
    game = cage.Game(tensor([[0.0, 0.0]]), tensor([[[25.0, 0.0], [0.0, 20.0]]]), 1.0)
    assert solved(game).policy[0, 0] < 0.8 < 0.99 < cage.rules.linear(game).log_policy[0, 0].exp()
