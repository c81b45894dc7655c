"""What the record of a row says."""

from __future__ import annotations

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of, decode
from transformers import AutoModelForCausalLM

from pipeline.runtime.assembly import assemble

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}


def test_weights_of_a_row_replace_the_configured_ones(tiny):
    rows = [ask("own", "hello", weights={"kind": 0.0}), ask("configured", "hello")]
    records = decode(config_of(tiny(), PAIR, decoding={"max_new_tokens": 3}), rows)
    assert records["own"].weights == {"kind": 0.0, "brief": 0.4}
    assert records["configured"].weights == {"kind": 0.7, "brief": 0.4}
    assert records["own"].payments["kind"] == 0.0


def test_numbers_of_a_record_are_the_sums_and_means_of_its_tokens(tiny):
    decoding = {"max_new_tokens": 12, "trace": "tokens", "agent_temperature": 0.3}
    record = decode(config_of(tiny(seed=2), PAIR, decoding=decoding), [ask("a", "hello")])["a"]
    assert len(record.tokens) == record.num_tokens
    for name in PAIR:
        paid = sum(token.payments[name] for token in record.tokens)
        assert paid == pytest.approx(record.payments[name])
        assert paid >= 0
    assert sum(record.payments.values()) > 0
    assert record.kl_per_token > 0
    assert 0 < record.covered_mass <= 1 + 1e-6
    assert record.max_residual < 1e-4
    assert record.num_unsolved == 0
    assert record.solver_steps >= 1


def test_a_principal_pays_its_value_above_its_threshold(tiny):
    decoding = {"max_new_tokens": 1, "trace": "tokens", "agent_temperature": 0.05, "temperature": 3.0}
    rows = [ask(f"r{at}", "hello " * at) for at in range(1, 9)]
    records = decode(config_of(tiny(seed=2), PAIR, decoding=decoding), rows).values()
    traced = [(record, record.tokens[0], name) for record in records for name in PAIR]
    for record, token, name in traced:
        value = record.weights[name] * record.rewards[name]
        assert token.payments[name] == pytest.approx(max(0.0, value - token.thresholds[name]))
    assert {token.payments[name] > 0 for _, token, name in traced} == {True, False}


def test_rewards_are_differences_of_a_plain_forward_pass(tiny):
    folder = tiny(seed=2)
    decoding = {"max_new_tokens": 8, "trace": "tokens"}
    config = config_of(folder, PAIR, decoding=decoding)
    assembly = assemble(config, NOWHERE)
    record = decode(config, [ask("a", "hello", response="good day")])["a"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = assembly.prompter.encode(({"role": "user", "content": "hello"},), assembly.topology.weights)

    @torch.no_grad()
    def total(role, answer):
        ids = torch.tensor([[*prompts[role], *answer]])
        logprobs = model(ids).logits[0, -len(answer) - 1 : -1].double().log_softmax(-1)
        return float(logprobs.gather(-1, torch.tensor(answer)[:, None]).sum())

    answer = [token.token_id for token in record.tokens]
    original = assembly.prompter.encode_answer("good day")
    assert original[-1] == 0
    for name in PAIR:
        assert record.rewards[name] == pytest.approx(total(name, answer) - total("base", answer), abs=1e-3)
        expected = total(name, original) - total("base", original)
        assert record.original_rewards[name] == pytest.approx(expected, abs=1e-3)


def test_the_better_of_old_and_new_answer_is_chosen_by_weighted_reward(tiny):
    rows = [ask("a", "hello", response="good day"), ask("none", "hello")]
    records = decode(config_of(tiny(seed=2), PAIR, decoding={"max_new_tokens": 8}), rows)
    record = records["a"]
    new = sum(record.weights[name] * record.rewards[name] for name in PAIR)
    old = sum(record.weights[name] * record.original_rewards[name] for name in PAIR)
    pair = (record.response, "good day") if new >= old else ("good day", record.response)
    assert (record.chosen, record.rejected) == pair
    assert records["none"].original_rewards is records["none"].chosen is None


def test_an_answer_drawn_just_as_the_existing_one_makes_no_pair(tiny):
    config = config_of(tiny(seed=2), PAIR, decoding={"max_new_tokens": 8})
    drawn = decode(config, [ask("a", "hello")])["a"].response
    record = decode(config, [ask("a", "hello", response=drawn)])["a"]
    assert record.response == record.original_response == drawn
    assert record.original_rewards is not None
    assert record.chosen is record.rejected is None


def test_an_existing_answer_beyond_the_context_is_kept_and_not_compared(tiny):
    config = config_of(tiny(seed=2), PAIR, decoding={"max_new_tokens": 4})
    assembly = assemble(config, NOWHERE)
    left = assembly.prompter.context_left(assembly.prompter.encode(ask("a", "hello").messages, {}))
    num_tokens, fits = 0, ""
    while num_tokens < left:
        fits += " sea"
        num_tokens = len(assembly.prompter.encode_answer(fits))
    records = decode(
        config, [ask("fits", "hello", response=fits[:-4]), ask("long", "hello", response=fits + " sea" * 9)]
    )
    assert records["fits"].original_rewards is not None
    assert records["fits"].chosen is not None
    long = records["long"]
    assert long.error is None
    assert long.original_response == fits + " sea" * 9
    assert long.original_rewards is long.chosen is long.rejected is None


def test_without_a_trace_the_statistics_of_the_game_are_left_out(tiny):
    record = decode(config_of(tiny(), PAIR, decoding={"max_new_tokens": 3, "trace": "none"}), [ask("a", "hi")])["a"]
    assert record.kl_per_token is record.covered_mass is record.max_residual is None
    assert record.tokens == ()


@pytest.mark.parametrize("rule", ["linear", "mixture", "maximin", "base"])
def test_other_rules_pay_nothing_and_say_so(tiny, rule):
    decoding = {"max_new_tokens": 5, "rule": rule, "agent_temperature": 0.5, "trace": "tokens"}
    record = decode(config_of(tiny(seed=2), PAIR, decoding=decoding), [ask("a", "hello")])["a"]
    assert record.payments == {"kind": None, "brief": None}
    assert record.tokens[0].thresholds == {"kind": None, "brief": None}
    if rule != "maximin":  # whose answer may be to leave the base as it is
        assert (record.kl_per_token > 1e-6) == (rule != "base")
