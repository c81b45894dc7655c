"""Kinds of principals: which roles and hosts they become, and what their rewards are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.decoding import NOWHERE, ask, config_of, decode, engine_of
from support.families import make_family
from support.lora import make_lora
from transformers import AutoModelForCausalLM

from pipeline.engine.engine import Engine, decode_rows
from pipeline.errors import ConfigurationError
from pipeline.runtime.assembly import assemble

DECODING = {"max_new_tokens": 10, "trace": "tokens", "agent_temperature": 0.5}


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """Make a LoRA adapter on the tiny Llama: adapter("q_proj", seed=1) is its folder."""

    def make(*targets: str, seed: int) -> Path:
        return make_lora(tmp_path_factory.mktemp(f"adapter{seed}"), tiny("llama"), *targets, seed=seed)

    return make


@torch.no_grad()
def plain_reward(assembly, answer, tuned, reference, role="base"):
    """log p_tuned(answer) - log p_reference(answer) by plain forward passes."""
    messages = ({"role": "user", "content": "hello"},)
    prompt = assembly.prompter.encode(messages, assembly.topology.weights)[role]

    def total(model):
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, -len(answer) - 1 : -1]
        return float(logits.double().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())

    return total(tuned) - (total(reference) if reference is not None else 0.0)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_prompted_principals_of_the_base_ride_in_its_forward_pass(tiny):
    principals = {
        "kind": {"kind": "prompted", "principle": "be kind"},
        "brief": {"kind": "prompted", "principle": "be brief"},
    }
    topology = assemble(config_of(tiny(), principals), NOWHERE).topology
    (host,) = topology.hosts
    assert [role.name for role in host.roles] == ["base", "kind", "brief"]
    assert [dict(principal.roles) for principal in topology.principals] == [
        {"tuned": "kind", "reference": "base"},
        {"tuned": "brief", "reference": "base"},
    ]


def test_models_given_twice_share_a_host_and_other_weights_do_not(tiny):
    small, ref = str(tiny("llama", seed=1)), str(tiny("llama", seed=2))
    principals = {
        "one": {"kind": "arm", "model": small, "reference": ref},
        "two": {"kind": "tuned_pair", "model": ref, "reference": small},
        "raw": {"kind": "arm", "model": small, "reference": "none"},
        "asked": {"kind": "prompted", "principle": "be kind", "model": small},
    }
    topology = assemble(config_of(tiny("llama", seed=0), principals), NOWHERE).topology
    assert [(host.name, [role.name for role in host.roles]) for host in topology.hosts] == [
        ("base", ["base"]),
        ("one", ["one", "asked"]),
        ("one.reference", ["one.reference"]),
    ]
    assert {principal.name: dict(principal.roles) for principal in topology.principals} == {
        "one": {"tuned": "one", "reference": "one.reference"},
        "two": {"tuned": "one.reference", "reference": "one"},
        "raw": {"tuned": "one"},
        "asked": {"tuned": "asked", "reference": "one"},
    }
    assert topology.hosts[1].serves == ("one", "two", "raw", "asked")


def test_rewards_of_separate_models_equal_plain_passes(tiny):
    folders = {seed: tiny("llama", seed=seed) for seed in range(3)}
    gpt = tiny("gpt2", seed=1)
    principals = {
        "arm": {"kind": "arm", "model": str(folders[1]), "reference": str(folders[2]), "weight": 0.3},
        "raw": {"kind": "arm", "model": str(gpt), "reference": "none", "weight": 0.1},
        "pair": {"kind": "tuned_pair", "model": str(folders[2]), "reference": str(folders[0]), "weight": 0.2},
    }
    config = config_of(folders[0], principals, decoding=DECODING)
    assembly = assemble(config, NOWHERE)
    record = decode(config, [ask("a", "hello")])["a"]
    answer = [token.token_id for token in record.tokens]
    models = {seed: load(folder) for seed, folder in folders.items()}
    expected = {
        "arm": plain_reward(assembly, answer, models[1], models[2]),
        "raw": plain_reward(assembly, answer, load(gpt), None),
        "pair": plain_reward(assembly, answer, models[2], models[0]),
    }
    assert record.rewards == pytest.approx(expected, abs=1e-3)


def test_adapters_are_rows_of_the_base_and_equal_models_of_their_own(tiny, adapter):
    import peft

    base = tiny("llama")
    first, second = adapter("q_proj", "v_proj", seed=1), adapter("q_proj", "down_proj", seed=2)
    principals = {
        "first": {"kind": "arm", "adapter": str(first), "weight": 0.6},
        "second": {"kind": "arm", "adapter": str(second), "reference": "backbone", "weight": 0.3},
    }
    config = config_of(base, principals, decoding=DECODING, cluster={"slots": 3})
    engine, assembly = engine_of(config)
    (plan,) = assembly.topology.hosts
    assert [(role.name, role.adapter) for role in plan.roles] == [
        ("base", None), ("first", "adapter0"), ("second", "adapter1"),
    ]  # fmt: skip
    rows = [ask("a", "hello"), ask("b", "what is this?"), ask("c", "more")]
    records = {record.row_id: record for record in decode_rows(engine, rows)}
    assert engine.calls.hosts.sampler.work().result().num_forwards == max(
        record.num_tokens for record in records.values()
    )
    answer = [token.token_id for token in records["a"].tokens]
    for name, folder in (("first", first), ("second", second)):
        alone = peft.PeftModel.from_pretrained(load(base), folder).eval()
        expected = plain_reward(assembly, answer, alone, load(base))
        assert records["a"].rewards[name] == pytest.approx(expected, abs=1e-3)
    alone = decode(config_of(base, principals, decoding=DECODING, cluster={"slots": 1}), rows[1:2])
    assert alone["b"] == records["b"]


def test_a_small_arm_with_an_adapter_steers_a_larger_base(tiny, adapter):
    principals = {"arm": {"kind": "arm", "model": str(tiny("llama")), "adapter": str(adapter("q_proj", seed=3))}}
    config = config_of(tiny("gpt2", seed=4), principals, decoding=DECODING)
    assembly = assemble(config, NOWHERE)
    assert [(host.name, [role.name for role in host.roles]) for host in assembly.topology.hosts] == [
        ("base", ["base"]),
        ("arm", ["arm", "arm.reference"]),
    ]
    record = decode(config, [ask("a", "hello")])["a"]
    assert record.kl_per_token > 0


def test_a_model_with_another_tokenizer_reads_answers_as_text(tiny, tmp_path):
    other = tiny_models.make_tokenizer(extra=("<|one-more|>",))
    folder = tiny_models.make_model(tmp_path / "other", tokenizer=other)
    principals = {"arm": {"kind": "arm", "model": str(folder), "reference": "none"}}
    _, host = assemble(config_of(tiny(), principals), NOWHERE).topology.hosts
    assert host.reads_text


def test_a_model_that_does_not_exist_is_refused_with_its_name(tiny):
    principals = {"arm": {"kind": "arm", "model": "/no/such/folder", "reference": "none"}}
    with pytest.raises(ConfigurationError, match="/no/such/folder"):
        assemble(config_of(tiny(), principals), NOWHERE)


def test_an_architecture_that_slots_do_not_decode_is_refused_where_slots_are_asked_for(tmp_path):
    folder = make_family(tmp_path, "minimax")
    with pytest.raises(ConfigurationError, match=r"for base.*minimax.*not decoded in slots.*attention: auto"):
        engine_of(config_of({"model": str(folder), "attention": "slots"}))


def test_several_hosts_give_the_same_record_in_one_group_or_two(tiny):
    principals = {"arm": {"kind": "arm", "model": str(tiny("llama", seed=1)), "reference": "none", "weight": 0.2}}
    rows = [ask(f"r{at}", "why " * at + "?") for at in range(9)]
    config = config_of(tiny("llama"), principals, decoding=DECODING, cluster={"slots": 6})
    one = decode(config, rows)
    engine, assembly = engine_of(config)
    given = (assembly.topology, engine.calls.hosts, assembly.prompter, config.decoding, assembly.variants)
    two = Engine(*given, num_slots=6, num_groups=2)
    assert {record.row_id: record for record in decode_rows(two, rows)} == one
