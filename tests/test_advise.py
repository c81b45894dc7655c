"""`cage advise`: what it records are the run's games, what it measures is what was put in, and what it suggests."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from support.decoding import NOWHERE
from transformers import AutoModelForCausalLM, AutoTokenizer

from cage.rule_names import RuleName
from cage.rules import SoftThreshold
from jobs.commands.advise import describe_advice, run_advise
from pipeline.advice.advice import advise
from pipeline.advice.comparison import Comparison, RuleChoice, choices
from pipeline.advice.gains import at_equal_kl, policies
from pipeline.advice.measures import correlation, measure_rewards
from pipeline.advice.recording import RecordedGames
from pipeline.advice.settings import COMPARABLE, AdviseConfig
from pipeline.config.files import parse_as
from pipeline.errors import ConfigurationError
from pipeline.evaluation.config import BootstrapConfig
from pipeline.stages.advise import record_games

PRINCIPALS = {
    "kind": {"kind": "prompted", "principle": "Be kind.", "weight": 0.6},
    "brief": {"kind": "prompted", "principle": "Be brief.", "weight": 0.4},
}
FAST = ["equilibrium", "mixture", "soft_threshold", "solo"]  # maximin takes a hundred times as long
ALL_RULES = choices(COMPARABLE, (0.0, 1.0, 2.0))


def config_of(**sections):
    tree = {
        "input": {"path": "unused.jsonl"},
        "output": {"path": "unused"},
        "base": "unused",
        "principals": PRINCIPALS,
        **sections,
    }
    return parse_as(AdviseConfig, tree)


def games_of(*, tokens=1.0, steps=1.0, noise=0.0, num_rows=30, per_row=8, seed=0):
    """Two principals whose views are the truth; what they say has noise."""
    generator = torch.Generator().manual_seed(seed)
    count, size = num_rows * per_row, 30

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def within(share, *shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) < share

    base = (3 * normal(count, size)).log_softmax(-1)
    rewards = {}
    for name in PRINCIPALS:
        true = torch.where(within(tokens, count, size) & within(steps, count, 1), 4 * normal(count, size), 0.0)
        rewards |= {name: true + noise * normal(count, size), f"{name}-view": true}
    rows = torch.arange(num_rows).repeat_interleave(per_row)
    return RecordedGames(base, rewards, rows, tuple(map(str, range(num_rows))))


def with_views(**advice):
    views = {name: {"kind": "prompted", "principle": f"Other words: {name}."} for name in PRINCIPALS}
    return config_of(advise={"views": views, "target_kl": 0.4, "rules": FAST, **advice})


def test_dense_clean_rewards_suggest_the_weighted_sum():
    found = advise(with_views(), games_of(noise=0.3))
    assert found.suggested.choice == RuleChoice(RuleName.LINEAR)
    assert not found.is_ahead
    assert found.confidence > 0.9
    assert all(each.share < 1 for each in found.rules[1:])


def test_sparse_noisy_rewards_suggest_a_threshold_with_an_interval_above_zero():
    found = advise(with_views(), games_of(tokens=0.1, steps=0.15, noise=2.0, num_rows=100))
    assert found.suggested.choice.rule is RuleName.SOFT_THRESHOLD
    assert found.is_ahead
    assert found.suggested.share > 1.2
    assert found.suggested.difference_interval[0] > 0
    assert found.confidence > 0.95


def test_without_a_view_the_weighted_sum_gains_most_by_construction():
    games = games_of(tokens=0.1, steps=0.15, noise=2.0)
    found = advise(config_of(advise={"target_kl": 0.4, "rules": FAST}), games)
    assert found.unseen == ("kind", "brief")
    assert found.suggested.choice.rule is RuleName.LINEAR
    assert max(each.share for each in found.rules) == 1.0
    assert all(each.noise is None for each in found.measures.values())


def test_a_lead_that_chance_explains_is_no_reason_to_leave_the_weighted_sum():
    found = advise(with_views(), games_of(tokens=0.1, steps=0.15, noise=2.0, num_rows=2, per_row=4, seed=3))
    assert not found.is_ahead
    assert found.suggested.choice.rule is RuleName.LINEAR


def test_games_that_decide_nothing_are_refused():
    with pytest.raises(ConfigurationError, match="2 prompts or more; got games of 1"):
        advise(with_views(), games_of(num_rows=1))
    games = games_of(num_rows=2)
    silent = replace(games, rewards={name: 0 * reward for name, reward in games.rewards.items()})
    with pytest.raises(ConfigurationError, match="does not leave the base"):
        advise(with_views(target_kl=None), silent)


def test_a_distance_that_linear_does_not_reach_is_refused_and_one_that_others_do_not_is_said():
    """Otherwise rules would be compared at different distances, under the words "at the same distance"."""
    games = games_of(num_rows=10)
    with pytest.raises(ConfigurationError, match=r"linear goes no further .* than [0-9.]+ nats .* at 1e\+03; give a"):
        advise(with_views(target_kl=1000.0), games)
    found = advise(with_views(rules=["solo"]), games)
    short = replace(found.rules[1], kl=0.2)
    said = describe_advice(replace(found, rules=(found.rules[0], short)), with_views())
    assert "no agent temperature takes these as far from the base: solo (0.2)" in said
    assert "no agent temperature" not in describe_advice(found, with_views())


def test_the_distance_of_the_configured_rule_has_each_principals_own_threshold():
    games = games_of(num_rows=10)
    thresholds = {"kind": -3.0, "brief": 5.0}
    decoding = {"rule": "soft_threshold", "soft_threshold": thresholds, "agent_temperature": 0.5}
    found = advise(config_of(decoding=decoding, advise={"rules": ["linear"]}), games)
    values = games.rewards_of(["kind", "brief"]) * torch.tensor([[0.6], [0.4]])
    rule = SoftThreshold(torch.tensor([-3.0, 5.0]))
    expected = policies(rule, games.base_NK, values, 0.5, torch.tensor([0.6, 0.4])).kl
    assert found.target_kl == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("choice", ALL_RULES, ids=str)
def test_every_rule_is_compared_at_the_same_distance(choice):
    games = games_of(noise=1.0, num_rows=1)
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    values = games.rewards_of(["kind", "brief"]) * weights[:, None]
    for target in (0.05, 0.5):
        found = at_equal_kl(choice.function, games.base_NK, values, target, weights)
        kl = (found.log_policy_NK.exp() * (found.log_policy_NK - games.base_NK)).sum(-1).mean().item()
        assert kl == pytest.approx(target, rel=2e-4)
        assert found.kl == pytest.approx(kl, rel=1e-9)


def test_a_distance_that_no_temperature_reaches_is_said():
    games = games_of()
    nothing = {name: torch.zeros_like(reward) for name, reward in games.rewards.items()}
    silent = RecordedGames(games.base_NK, nothing, games.row_N, games.row_ids)
    comparison = Comparison(silent, {"kind": 1.0}, {}, BootstrapConfig(samples=100))
    [found] = comparison.compare([RuleChoice(RuleName.LINEAR)], 0.5)
    assert (found.kl, found.gain) == (pytest.approx(0, abs=1e-12), 0.0)
    assert math.isnan(found.share)


def test_the_gain_is_that_of_a_hand_made_game():
    """Two tokens at even odds, one worth 1 more: the sum at mean KL k moves p to where p log 2p + ... = k."""
    base = torch.full((4, 2), 0.5, dtype=torch.float64).log()
    reward = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    games = RecordedGames(base, {"a": reward, "a-view": 3 * reward}, torch.tensor([0, 0, 1, 1]), ("x", "y"))
    comparison = Comparison(games, {"a": 0.5, "unused": 0.0}, {"a": "a-view"}, BootstrapConfig(samples=100))
    p = 0.8
    target = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    [found] = comparison.compare([RuleChoice(RuleName.LINEAR)], target)
    assert found.gain == pytest.approx(0.5 * 3 * (p - 0.5), rel=1e-3)
    assert found.gains == {"a": pytest.approx(3 * (p - 0.5), rel=1e-3)}
    assert found.agent_temperature == pytest.approx(0.5 / math.log(p / (1 - p)), rel=1e-3)


def test_measures_find_what_was_put_in():
    """A quarter of the base's mass has values of one size in half of the steps; the view has noise of its own."""
    count, size = 400, 40
    base = torch.full((count, size), 1 / size, dtype=torch.float64).log()
    true = torch.zeros(count, size, dtype=torch.float64)
    true[::2, : size // 8], true[::2, size // 8 : size // 4] = 2.0, -2.0
    found = measure_rewards(base, true + 5.0, None)
    assert found.spread == pytest.approx(math.sqrt(0.5 * 0.25 * 4))
    assert found.token_share == pytest.approx(0.25)
    assert found.step_share == pytest.approx(0.5)
    assert (found.noise, found.agreement) == (None, None)
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(2, count, size, generator=generator, dtype=torch.float64)
    noisy = measure_rewards(base, true + noise[0], true + noise[1])
    assert noisy.noise == pytest.approx(0.5, rel=0.05)
    assert noisy.agreement == pytest.approx(0.5 / (0.5 + 0.25), rel=0.05)
    louder = measure_rewards(base, true + noise[0], 3 * (true + noise[1]))
    assert (louder.noise, louder.agreement) == pytest.approx((noisy.noise, noisy.agreement)), "3 times as large"
    assert correlation(base, true, -true) == pytest.approx(-1)
    assert correlation(base, true, torch.zeros_like(true)) == 0


def test_a_louder_view_counts_no_more_than_its_principal():
    games = games_of(noise=0.5)
    first = next(iter(PRINCIPALS))
    louder = replace(games, rewards={**games.rewards, f"{first}-view": 5 * games.rewards[f"{first}-view"]})
    plain, other = advise(with_views(), games), advise(with_views(), louder)
    assert other.measures[first].noise == pytest.approx(plain.measures[first].noise)
    for one, two in zip(plain.rules, other.rules, strict=True):
        assert two.gains == pytest.approx(one.gains)
        assert two.share == pytest.approx(one.share)


def test_a_principal_without_values_is_measured():
    base = torch.full((3, 4), 0.25, dtype=torch.float64).log()
    found = measure_rewards(base, torch.ones(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64))
    assert (found.spread, found.noise, found.agreement) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"principals": {}}, "there are none"),
        ({"decoding": {"unit": "answer"}}, "got unit: answer"),
        ({"decoding": {"candidates": "all"}}, "at most 1024; got all"),
        ({"decoding": {"candidates": 2000}}, "at most 1024; got 2000"),
        ({"advise": {"views": {"other": PRINCIPALS["kind"]}}}, "unknown principal 'other'"),
        ({"advise": {"rules": ["base"]}}, "base cannot be compared"),
        ({"advise": {"rules": ["best_of_n"]}}, "best_of_n cannot be compared"),
        ({"advise": {"rules": ["parm"]}}, "parm cannot be compared"),
        ({"principals": {"kind": {**PRINCIPALS["kind"], "weight": 0}}}, "above 0"),
        ({"input": {"path": "x.jsonl", "weights": "w"}}, "input.weights has no effect"),
        ({"grid": {"weights": {"step": 0.5}}}, "grid.weights has no effect"),
        (
            {
                "principals": {**PRINCIPALS, "kind-view": PRINCIPALS["kind"]},
                "advise": {"views": {"kind": PRINCIPALS["kind"]}},
            },
            "'kind-view' is needed for a view",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(sections, words):
    with pytest.raises(ConfigurationError) as refused:
        config_of(**sections)
    assert words in str(refused.value)


def test_games_are_read_as_they_were_written(tmp_path):
    games = games_of(num_rows=3, per_row=2)
    games.save(tmp_path / "below" / "games.npz")
    found = RecordedGames.load(tmp_path / "below" / "games.npz")
    assert found.row_ids == games.row_ids
    assert found.row_N.tolist() == games.row_N.tolist()
    assert list(found.rewards) == list(games.rewards)
    assert torch.allclose(found.base_NK, games.base_NK, atol=1e-5)
    assert torch.allclose(found.rewards["kind"], games.rewards["kind"], atol=1e-5)
    (tmp_path / "other.npz").write_bytes(b"something else")
    with pytest.raises(ConfigurationError, match="does not hold recorded games"):
        RecordedGames.load(tmp_path / "other.npz")


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory):
    """A job on a tiny model: a configuration and its file."""
    folder = tmp_path_factory.mktemp("advise")
    prompts = [{"id": str(at), "prompt": f"Say something about {at}."} for at in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    tree = {
        "input": {"path": str(folder / "prompts.jsonl"), "prompt": "prompt", "id": "id"},
        "output": {"path": str(folder / "run")},
        "base": str(tiny()),
        "principals": PRINCIPALS,
        "decoding": {"candidates": 20, "max_new_tokens": 6, "agent_temperature": 0.2},
        "cluster": {"transport": "local", "slots": 4},
        "advise": {"prompts": 3, "rules": FAST, "views": {"kind": {"kind": "prompted", "principle": "Be nice."}}},
    }
    file = folder / "job.yaml"
    file.write_text(json.dumps(tree))
    return parse_as(AdviseConfig, tree), file


def test_recorded_games_are_what_plain_forward_passes_say(job, tiny):
    config, _ = job
    games = record_games(config, NOWHERE, sys.stderr)
    assert games.row_ids == ("0", "1", "2")
    assert list(games.rewards) == ["kind", "brief", "kind-view"]
    assert 3 <= games.num_games <= 18
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny()), AutoTokenizer.from_pretrained(tiny())

    def first_logprobs(row, principle=None):
        messages = [{"role": "user", "content": f"Say something about {row}."}]
        if principle is not None:
            messages = [{"role": "system", "content": principle}, *messages]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    for row in range(3):
        game = games.row_N.tolist().index(row)
        plain = first_logprobs(row)
        top = plain.topk(20)
        assert torch.allclose(games.base_NK[game], top.values.log_softmax(-1), atol=1e-4)
        for name, principle in (("kind", "Be kind."), ("brief", "Be brief."), ("kind-view", "Be nice.")):
            expected = (first_logprobs(row, principle) - plain)[top.indices]
            assert torch.allclose(games.rewards[name][game], expected, atol=1e-4)


def test_the_command_suggests_lines_and_keeps_the_games(job, tmp_path, capsys, monkeypatch):
    _, file = job
    games = tmp_path / "games.npz"
    run_advise(file, [], games_file=games)
    said = capsys.readouterr().out
    assert "suggested:" in said
    assert "without a view: brief" in said
    [lines] = [block for block in said.split("\n\n") if block.startswith("decoding:")]
    decoding = yaml.safe_load(lines)["decoding"]
    assert decoding["rule"] in {str(rule) for rule in RuleName}
    assert decoding["target_kl"] > 0
    monkeypatch.setattr("pipeline.stages.advise.record_games", None)  # it is not needed again
    run_advise(file, ["advise.rules=[equilibrium]"], games_file=games)
    again = capsys.readouterr().out
    assert "equilibrium" in again
    assert "solo" not in again
    with pytest.raises(ConfigurationError, match=r"another principals\.kind\. Remove it"):
        run_advise(file, ["principals.kind.principle=Be rude."], games_file=games)
    run_advise(file, ["principals.kind.weight=2", "advise.rules=[equilibrium]"], games_file=games)  # needs no others
    with pytest.raises(ConfigurationError, match="holds no games of more"):
        run_advise(file, ["principals.more={kind: prompted, principle: x}"], games_file=games)


def test_a_lead_over_a_loss_is_said_in_nats():
    """A share of what linear loses would say the opposite."""
    advice = advise(with_views(), games_of(tokens=0.1, steps=0.15, noise=2.0, num_rows=100))
    rules = (replace(advice.rules[0], gain=-0.1), *advice.rules[1:])
    said = " ".join(describe_advice(replace(advice, rules=rules), with_views()).split())
    assert "nats per token where linear gains -0.1 at the same distance" in said
    assert "times as much" not in said


def test_the_suggestion_is_a_configuration_that_loads(capsys):
    config = with_views()
    advice = advise(config, games_of(tokens=0.1, steps=0.15, noise=2.0, num_rows=100))
    said = describe_advice(advice, config)
    lines = yaml.safe_load(said.split("in a configuration:\n\n")[1])
    parsed = config_of(**lines)
    assert parsed.decoding.rule is RuleName.SOFT_THRESHOLD
    assert parsed.decoding.soft_threshold == advice.suggested.choice.k
    assert parsed.decoding.target_kl == 0.4
