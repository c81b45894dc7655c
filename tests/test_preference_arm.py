"""Kind `preference_arm`: PARM's adapters at unit vectors and at each row's own weights, against merged weights."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.decoding import NOWHERE, ask, config_of, decode
from support.lora import make_lora
from support.preference_adapters import make_preference_adapter, merged
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigurationError
from pipeline.hub.preference_adapters import PreferenceForm
from pipeline.runtime.assembly import assemble
from pipeline.worker.adapters import LowRank, TokenAdapters
from pipeline.worker.joined_projections import _join

DECODING = {"max_new_tokens": 6, "trace": "tokens", "agent_temperature": 0.5}
WEIGHTS = [{"kind": 0.7, "brief": 0.3}, {"kind": 0.0, "brief": 2.0}, {"kind": 1.0, "brief": 1.0}]


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return make_preference_adapter(tmp_path_factory.mktemp("parm"), tiny())


def principals(adapter, **options):
    return {
        name: {"kind": "preference_arm", "adapter": str(adapter), "objective": number, "weight": weight, **options}
        for name, number, weight in (("kind", 0, 0.7), ("brief", 1, 0.3))
    }


@torch.no_grad()
def plain_reward(model, base, assembly, row, ids):
    """log p_model(answer) - log p_base(answer) by plain forward passes."""
    prompt = assembly.prompter.encode(row.messages, {"kind": 0.7, "brief": 0.3})["base"]
    totals = []
    for each in (model, base):
        logits = each(torch.tensor([[*prompt, *ids]])).logits[0, -len(ids) - 1 : -1].double()
        totals.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum().item())
    return totals[0] - totals[1]


@pytest.mark.parametrize("attention", ["slots", "plain"])
def test_at_unit_vectors_rewards_are_those_of_merged_weights(tiny, adapter, attention):
    config = config_of({"model": str(tiny()), "attention": attention}, principals(adapter), decoding=DECODING)
    assembly = assemble(config, NOWHERE)
    [host] = assembly.hosts
    assert len(host.adapters) == 2
    rows = [ask(f"r{at}", "hello " * at + "you", response="well then") for at in range(3)]
    records = decode(config, rows)
    base = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    for name, vector in (("kind", [1.0, 0.0]), ("brief", [0.0, 1.0])):
        model = merged(tiny(), adapter, vector)
        for row in rows:
            record = records[row.row_id]
            found = [token.token_id for token in record.tokens]
            assert record.rewards[name] == pytest.approx(plain_reward(model, base, assembly, row, found), abs=1e-3)
            existing = assembly.prompter.encode_answer(row.response)
            expected = plain_reward(model, base, assembly, row, existing)
            assert record.original_rewards[name] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("attention", ["slots", "plain"])
def test_at_its_own_weights_a_row_has_an_adapter_of_its_own(tiny, adapter, attention):
    """Rows of several weights in one batch; each reward is that of the model merged at the row's vector."""
    config = config_of(
        {"model": str(tiny()), "attention": attention},
        principals(adapter, preference="weights"),
        decoding=DECODING | {"rule": "linear"},
        cluster={"slots": 3},
    )
    assembly = assemble(config, NOWHERE)
    assert [role.name for role in assembly.hosts[0].roles] == ["base", "kind"]  # one role for both principals
    rows = [
        ask(f"r{at}", "hello " * at + "you", weights=weights, response="well then")
        for at, weights in enumerate(WEIGHTS)
    ]
    records = decode(config, rows)
    base = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    for row in rows:
        record = records[row.row_id]
        total = sum(row.weights.values())
        model = merged(tiny(), adapter, [weight / total for weight in row.weights.values()])
        found = [token.token_id for token in record.tokens]
        assert record.rewards["kind"] == record.rewards["brief"]
        assert record.rewards["kind"] == pytest.approx(plain_reward(model, base, assembly, row, found), abs=1e-3)
        existing = assembly.prompter.encode_answer(row.response)
        expected = plain_reward(model, base, assembly, row, existing)
        assert record.original_rewards["kind"] == pytest.approx(expected, abs=1e-3)
    rewards = [records[row.row_id].original_rewards["kind"] for row in rows]
    assert min(abs(one - other) for one, other in pairwise(rewards)) > 1e-2


def test_a_rows_bits_do_not_depend_on_the_weights_beside_it(tiny, adapter):
    named = principals(adapter, preference="weights")
    rows = [ask(f"r{at}", "tell me", weights=WEIGHTS[at % 3]) for at in range(6)]
    config = config_of(tiny(), named, decoding=DECODING, cluster={"slots": 4})
    records = decode(config, rows)
    lone = config_of(tiny(), named, decoding=DECODING, cluster={"slots": 1})
    for row in rows:
        assert decode(lone, [row])[row.row_id] == records[row.row_id]


def test_an_objective_without_a_principal_weighs_nothing(tiny, adapter):
    named = {"kind": principals(adapter, preference="weights")["kind"]}
    unit = {"kind": principals(adapter)["kind"]}
    found, expected = (
        decode(config_of(tiny(), each, decoding=DECODING), [ask("r", "tell me")])["r"] for each in (named, unit)
    )
    assert found.rewards["kind"] == pytest.approx(expected.rewards["kind"], abs=1e-4)


def test_names_of_objectives_are_those_of_the_adapter(tiny, tmp_path):
    folder = make_preference_adapter(tmp_path / "parm", tiny(), objectives=["safe", "useful"])
    named = {"a": {"kind": "preference_arm", "adapter": str(folder), "objective": "useful"}}
    [adapter] = assemble(config_of(tiny(), named), NOWHERE).hosts[0].adapters.values()
    assert adapter.objective == 1
    named["a"]["objective"] = "kind"
    with pytest.raises(ConfigurationError, match="has no objective kind; it has safe, useful"):
        assemble(config_of(tiny(), named), NOWHERE)


def test_each_kind_of_adapter_has_its_kind_of_principal(tiny, adapter, tmp_path):
    lora = make_lora(tmp_path / "lora", tiny(), "q_proj")
    with pytest.raises(
        ConfigurationError, match=r"depends on a preference vector .* use it with kind preference_arm"
    ):
        assemble(config_of(tiny(), {"a": {"kind": "arm", "adapter": str(adapter)}}), NOWHERE)
    with pytest.raises(ConfigurationError, match="depends on no preference vector"):
        assemble(config_of(tiny(), principals(lora)), NOWHERE)


def broken(folder, tiny, *, drop=None, reshape=None, **config):
    made = make_preference_adapter(folder, tiny(), **config)
    file = made / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if drop and key.endswith(drop)][:1]:
        del tensors[key]
    for key in [key for key in tensors if reshape and key.endswith(reshape)][:1]:
        tensors[key] = tensors[key][:1].clone()
    save_file(tensors, file)
    return made


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"drop": "pblora_W2"}, r"its file lacks .*pblora_W2"),
        ({"reshape": "pblora_W1"}, r"pblora_W1 has the shape \(1, 3\), and adapter_config.json says \(3, 3\)"),
        ({"r1": 0}, "r1: 0"),
        ({"r2": True}, "r2: True"),
        ({"lora_alpha": None}, "lora_alpha: None in adapter_config.json must be a positive number"),
        ({"lora_alpha": "big"}, "lora_alpha: big in adapter_config.json must be a positive number"),
        ({"bias": "all"}, "brings biases"),
        ({"objectives": ["a", "a"]}, "objectives must be 2 different names"),
    ],
)
def test_a_damaged_adapter_is_refused(tiny, tmp_path, fault, message):
    folder = broken(tmp_path / "parm", tiny, **fault)
    with pytest.raises(ConfigurationError, match=message):
        decode(config_of(tiny(), principals(folder), decoding=DECODING), [ask("r", "x")])


def test_joined_projections_scale_ranks_as_they_do_alone():
    form = PreferenceForm(1, 2, 4.0, ("a", "b"))
    adapters = TokenAdapters(["own"], {"own": form})
    adapters.of_tokens = torch.tensor([0, 1, 1])
    adapters.preferences = torch.tensor([[1.0, 0.5, 0.5], [1.0, 0.2, 0.8], [1.0, 1.0, 0.0]])
    columns = torch.tensor([0, 1, 1, 2, 2])
    gates = torch.tensor([[0.0] * 5, [2.0] * 5])
    parts = [LowRank(torch.randn(5, 4), torch.randn(size, 5), gates, adapters, columns) for size in (3, 2)]
    parts.insert(1, LowRank(torch.randn(4, 4), torch.randn(2, 4), torch.ones(2, 4), adapters))
    states = torch.randn(3, 4)
    joined = _join(parts, [3, 2, 2])
    torch.testing.assert_close(joined(states), torch.cat([part(states) for part in parts], 1))
    assert not torch.equal(joined(states)[1], joined(states[[0, 2, 1]])[1])


def test_a_checkpoint_of_parm_has_every_key_that_is_read(adapter):
    """The layout of the public repository: names of tensors and of the configuration's keys."""
    tensors, config = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    assert {key.rpartition(".")[2] for key in tensors} == {"pblora_A", "pblora_B", "pblora_W1", "pblora_W2"}
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors)
    assert {"peft_type", "r1", "r2", "obj_num", "lora_alpha", "target_modules"} <= config.keys()
