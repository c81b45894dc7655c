"""The rules behind one signature, each against its formula or an optimiser of its own."""

import subprocess
import sys

import pytest
import torch

import cage
from cage import RuleName, rules
from cage.examples import random_games

MIXING_RULES = [RuleName.MIXTURE, RuleName.FORWARD_KL, RuleName.JENSEN_SHANNON]


def small_games(num_principals=2, value_scale=2.0, kind="arm-like", num_rows=12, num_tokens=9):
    return random_games(
        kind, num_rows=num_rows, num_principals=num_principals, num_tokens=num_tokens, value_scale=value_scale, seed=4
    )


def some_weights(game):
    weights = torch.rand(game.num_rows, game.num_principals, generator=torch.Generator().manual_seed(1))
    return weights.double() + 0.1


def test_every_rule_name_has_a_function_and_every_function_a_name():
    assert set(rules.by_name) == set(RuleName)
    assert all(rule.summary for rule in RuleName)


def test_rule_names_are_read_without_torch():
    code = "import sys; from cage.rule_names import RuleName; print(len(RuleName), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(RuleName)), "False"]


@pytest.mark.parametrize("name", RuleName)
def test_a_rule_uses_principals_exactly_if_they_change_its_answers(name):
    game, rule = small_games(), rules.by_name[name]
    weights, other_weights = some_weights(game), some_weights(game).flip(1)
    decision = rule(game, weights)
    other_values = rule(cage.Game(game.base_logprobs, 2 * game.values.flip(-1), 1.0), weights)
    other_temperature = rule(cage.Game(game.base_logprobs, game.values, 0.3), weights)
    changes = [not torch.equal(each.log_policy, decision.log_policy) for each in (other_values, other_temperature)]
    assert changes == [name.uses_principals, name.uses_temperature]
    if not name.uses_principals:
        assert torch.equal(rule(game, other_weights).log_policy, decision.log_policy)


@pytest.mark.parametrize("name", [name for name in RuleName if name.has_fixed_step_solver])
def test_a_rule_with_a_fixed_step_solver_has_the_same_answers_by_it(name):
    game = small_games()
    fixed = cage.FixedStepNewton(num_steps=40).solve(game)
    assert (fixed.status == cage.Status.CONVERGED).all()
    assert torch.allclose(fixed.log_policy, rules.by_name[name](game).log_policy, atol=1e-9)


@pytest.mark.parametrize("name", RuleName)
@pytest.mark.parametrize("num_principals", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rule_takes_the_same_call_and_gives_a_policy(name, num_principals, dtype):
    game = random_games(
        "masked", num_rows=8, num_principals=num_principals, num_tokens=12, value_scale=2.0, dtype=dtype
    )
    decision = rules.by_name[name](game, torch.ones(8, num_principals))
    assert decision.log_policy.dtype == dtype
    assert torch.allclose(decision.log_policy.exp().sum(1), torch.ones(8, dtype=dtype), atol=1e-5)
    assert (decision.log_policy[game.base_logprobs == -torch.inf] == -torch.inf).all()
    assert decision.status.tolist() == [cage.Status.CONVERGED] * 8
    assert decision.residual.shape == decision.num_steps.shape == (8,)
    assert (decision.thresholds is not None) == name.pays


@pytest.mark.parametrize("name", RuleName)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_every_rule_reports_a_row_that_is_not_finite(name, bad):
    game = small_games()
    base = game.base_logprobs.clone()
    base[3, 2] = bad
    decision = rules.by_name[name](cage.Game(base, game.values, 1.0), some_weights(game))
    assert decision.status.tolist() == [0, 0, 0, cage.Status.NOT_FINITE] + [0] * 8
    assert torch.isnan(decision.log_policy[3]).all()
    assert not torch.isnan(decision.log_policy[[0, 1, 2, 4]]).any()


@pytest.mark.parametrize("name", [name for name in RuleName if name.uses_principals])
def test_a_bad_value_matters_to_every_rule_that_reads_values(name):
    game = small_games()
    values = game.values.clone()
    values[3, 1, 2] = torch.nan
    decision = rules.by_name[name](cage.Game(game.base_logprobs, values, 1.0), some_weights(game))
    assert decision.status.tolist() == [0, 0, 0, cage.Status.NOT_FINITE] + [0] * 8


def test_base_and_linear_are_their_formulas():
    game = small_games(3)
    assert torch.allclose(rules.base(game).log_policy, torch.log_softmax(game.base_logprobs, -1))
    at_half = cage.Game(game.base_logprobs, game.values, 0.5)
    expected = torch.log_softmax(game.base_logprobs + game.values.sum(1) / 0.5, -1)
    assert torch.allclose(rules.linear(at_half).log_policy, expected)


def test_best_of_n_takes_the_highest_sum_that_the_base_can_draw_and_shares_ties_as_the_base_does():
    base = torch.tensor([[0.2, 0.3, 0.5, 0.0]], dtype=torch.float64).log()
    values = torch.tensor([[[1.0, 2.0, 0.0, 9.0], [3.0, 2.0, 0.0, 9.0]]], dtype=torch.float64)
    policy = rules.best_of_n(cage.Game(base, values, 0.7)).log_policy.exp()
    assert torch.allclose(policy, torch.tensor([[0.4, 0.6, 0.0, 0.0]], dtype=torch.float64))
    game = small_games(3)
    cold = rules.linear(cage.Game(game.base_logprobs, game.values, 1e-6)).log_policy.exp()
    assert torch.allclose(rules.best_of_n(game).log_policy.exp(), cold, atol=1e-9)


@pytest.mark.parametrize("k", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("tau", [0.3, 2.0])
def test_soft_threshold_is_its_formula(k, tau):
    game = small_games(3)
    decision = rules.SoftThreshold(k)(cage.Game(game.base_logprobs, game.values, tau))
    policy = torch.softmax(game.base_logprobs, -1)
    thresholds = (policy[:, None] * game.values).sum(-1) + k * tau
    paid = (game.values - thresholds[..., None]).clamp(min=0)
    assert torch.allclose(decision.thresholds, thresholds)
    assert torch.allclose(decision.log_policy, torch.log_softmax(game.base_logprobs + paid.sum(1) / tau, -1))


def test_soft_threshold_far_below_every_value_is_the_weighted_sum_and_at_1_is_silent_where_nobody_pays():
    game = small_games(2)
    low = rules.SoftThreshold(-1e4)(game)
    assert torch.allclose(low.log_policy, rules.linear(game).log_policy, atol=1e-9)
    calm = cage.Game(game.base_logprobs, game.values, 100.0)
    for rule in (rules.soft_threshold, rules.solo, rules.equilibrium):
        assert torch.allclose(rule(calm).log_policy, rules.base(calm).log_policy)


def test_soft_threshold_takes_a_k_for_each_principal_and_row():
    game = small_games(2)
    k = torch.tensor([0.0, 2.0], dtype=torch.float64).expand(game.num_rows, 2)
    decision = rules.SoftThreshold(k)(game)
    for j, each in enumerate((0.0, 2.0)):
        assert torch.equal(decision.thresholds[:, j], rules.SoftThreshold(each)(game).thresholds[:, j])


def test_solo_pays_what_each_principal_pays_alone():
    game = small_games(3, value_scale=4.0)
    decision = rules.solo(game)
    paid = torch.zeros_like(game.values[:, 0])
    for j in range(3):
        alone = cage.solve(cage.Game(game.base_logprobs, game.values[:, [j]], 1.0))
        assert torch.allclose(decision.thresholds[:, j], alone.thresholds[:, 0])
        paid += alone.incentives[:, 0]
    assert torch.allclose(decision.log_policy, torch.log_softmax(game.base_logprobs + paid, -1))
    lone = cage.Game(game.base_logprobs, game.values[:, :1], 1.0)
    assert torch.allclose(rules.solo(lone).log_policy, rules.equilibrium(lone).log_policy)


def test_mixture_mixes_the_tilted_policies_of_the_rewards():
    game = small_games(3)
    weights = some_weights(game)
    rewards = game.values
    decision = rules.mixture(cage.Game(game.base_logprobs, weights[..., None] * rewards, 2.0), weights)
    tilted = torch.softmax(game.base_logprobs[:, None] + rewards / 2.0, -1)
    expected = ((weights / weights.sum(1, keepdim=True))[..., None] * tilted).sum(1)
    assert torch.allclose(decision.log_policy.exp(), expected)


def test_forward_kl_is_the_harmonic_mean_of_the_tilted_policies():
    game = small_games(3)
    weights = some_weights(game)
    decision = rules.forward_kl(cage.Game(game.base_logprobs, weights[..., None] * game.values, 2.0), weights)
    inverse = weights[..., None] / torch.softmax(game.base_logprobs[:, None] + game.values / 2.0, -1)
    expected = 1 / inverse.sum(1)
    assert torch.allclose(decision.log_policy.exp(), expected / expected.sum(1, keepdim=True))


def test_jensen_shannon_is_mod_s_formula():
    game = small_games(3)
    weights = some_weights(game)
    decision = rules.jensen_shannon(cage.Game(game.base_logprobs, weights[..., None] * game.values, 2.0), weights)
    base = torch.softmax(game.base_logprobs, -1)
    ratios = torch.softmax(game.base_logprobs[:, None] + game.values / 2.0, -1) / base[:, None]
    shares = weights / weights.sum(1, keepdim=True)
    derivative = (shares[..., None] * (2 * ratios / (1 + ratios)).log()).sum(1)  # f'(x) = log(2x / (1 + x))
    expected = base * derivative.exp() / (2 - derivative.exp())
    assert torch.allclose(decision.log_policy.exp(), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("mixing", MIXING_RULES)
def test_a_rule_that_mixes_policies_is_a_principal_s_own_policy_where_the_others_have_no_weight(mixing):
    """MOD with one-hot weights is that model, however rare the token that it wants is under the base."""
    base = torch.log_softmax(torch.tensor([[0.0, -1.0, -90.0, -torch.inf]]), -1)
    values = torch.tensor([[[0.0, 1.0, 95.0, 3.0], [0.0, 0.0, 0.0, 0.0]]])
    decision = rules.by_name[mixing](cage.Game(base, values, 1.0), torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(decision.log_policy, torch.log_softmax(base + values[:, 0], -1), atol=1e-5)


@pytest.mark.parametrize("mixing", MIXING_RULES)
def test_the_linear_rule_is_mod_for_the_reverse_kl_and_all_agree_for_equal_principals(mixing):
    game = small_games(2)
    weights = some_weights(game)
    alike = game.values[:, :1].expand(-1, 2, -1)
    shared = cage.Game(game.base_logprobs, (weights / weights.sum(1, keepdim=True))[..., None] * alike, 1.0)
    same = cage.Game(game.base_logprobs, weights[..., None] * alike, 1.0)
    assert torch.allclose(rules.by_name[mixing](same, weights).log_policy, rules.linear(shared).log_policy)


@pytest.mark.parametrize("mixing", MIXING_RULES)
def test_a_zero_weight_takes_no_part_in_the_mixture(mixing):
    mix = rules.by_name[mixing]
    game = small_games(3)
    weights = some_weights(game)
    weights[:, 1] = 0
    values = weights[..., None] * game.values
    decision = mix(cage.Game(game.base_logprobs, values, 1.0), weights)
    alone = cage.Game(game.base_logprobs, values[:, [0, 2]], 1.0)
    assert torch.allclose(decision.log_policy, mix(alone, weights[:, [0, 2]]).log_policy)
    nobody = mix(cage.Game(game.base_logprobs, 0 * values, 1.0), 0 * weights)
    assert torch.allclose(nobody.log_policy, torch.log_softmax(game.base_logprobs, -1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, r"mixes policies needs weights \(12, 2\); got None"),
        (torch.ones(12, 3), r"mixes policies needs weights \(12, 2\); got \(12, 3\)"),
        (-torch.ones(12, 2), r"finite and not negative; got -1.0"),
        (torch.full((12, 2), torch.nan), r"finite and not negative; got nan"),
    ],
)
def test_mixture_names_weights_that_it_cannot_use(weights, message):
    with pytest.raises(ValueError, match=message):
        rules.mixture(small_games(), weights)


def worst_principal_s_objective(game, policy):
    policy = policy.clamp(min=1e-300)
    kl = (policy * (policy.log() - torch.log_softmax(game.base_logprobs, -1))).sum(-1)
    return (policy[:, None] * game.values).sum(-1).amin(-1) - game.agent_temperature * kl


@pytest.mark.parametrize("num_principals", [2, 3, 6])
@pytest.mark.parametrize("value_scale", [0.5, 3.0, 30.0])
def test_no_other_shares_or_policies_serve_the_worst_off_better(num_principals, value_scale):
    """Duality: min_j E[v_j] - tau KL at maximin's policy equals the smallest log-partition, tau A(l)."""
    game = small_games(num_principals, value_scale, kind="plain", num_rows=30)
    decision = rules.maximin(game)
    assert decision.residual.max() <= 1e-9
    reached = worst_principal_s_objective(game, decision.log_policy.exp())
    generator = torch.Generator().manual_seed(0)
    for concentration in (0.2, 1.0, 5.0):
        shares = torch.rand(200, 30, num_principals, generator=generator, dtype=torch.float64) ** (1 / concentration)
        shares = shares / shares.sum(-1, keepdim=True)
        tilt = torch.log_softmax(game.base_logprobs, -1) + torch.einsum("nbj,bjv->nbv", shares, game.values)
        assert (torch.logsumexp(tilt, -1) >= reached - 1e-6).all()
    nearby = torch.softmax(decision.log_policy + 0.1 * torch.randn(200, 30, 9, generator=generator), -1)
    for policy in nearby:
        assert (worst_principal_s_objective(game, policy) <= reached + 1e-7).all()


def test_maximin_gives_an_absent_principal_no_say():
    game = small_games(2)
    nothing = torch.full_like(game.values[:, :1], -3.0)
    joined = cage.Game(game.base_logprobs, torch.cat([nothing, game.values], 1), 1.0)
    assert torch.allclose(rules.maximin(joined).log_policy, rules.maximin(game).log_policy, atol=1e-6)
    alone = cage.Game(game.base_logprobs, nothing, 1.0)
    assert torch.allclose(rules.maximin(alone).log_policy, torch.log_softmax(game.base_logprobs, -1))


def test_with_one_principal_maximin_is_linear():
    game = small_games(1)
    assert torch.allclose(rules.maximin(game).log_policy, rules.linear(game).log_policy)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "arm-like", "vetoes", "equal principals", "masked"])
@pytest.mark.parametrize("value_scale", [0.1, 10.0, 30.0])
def test_maximin_is_solved_to_its_tolerance(kind, value_scale):
    for num_principals in (2, 5, 8):
        game = small_games(num_principals, value_scale, kind=kind, num_rows=50, num_tokens=50)
        assert rules.maximin(game).residual.max() <= 1e-9


def test_too_few_steps_of_maximin_are_reported():
    decision = rules.Maximin(max_steps=2)(small_games(3, 10.0))
    assert (decision.status == cage.Status.MAX_STEPS).any()


def test_equilibrium_takes_the_default_method_or_the_given_one():
    game = small_games(3)
    assert torch.equal(rules.equilibrium(game).log_policy, cage.solve(game).log_policy)
    swept = rules.Equilibrium(method=cage.GaussSeidel())(game)
    assert torch.equal(swept.thresholds, cage.GaussSeidel().solve(game).thresholds)
