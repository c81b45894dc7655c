"""Hosts whose layers are on several devices: simulated ones, whose tensors cannot meet, and GPUs where there are."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from support.decoding import NOWHERE, config_of, decode
from support.families import make_family
from support.heads import random
from support.language_models import CHANGING_BATCHES, CHANGING_PROMPTS, load_in_slots, logits_after, spec_of
from support.lora import make_lora
from support.preference_adapters import make_preference_adapter
from support.rank_groups import decode_with, numbers_of, tokens_of
from support.runs import write_prompts
from support.sampling_hosts import PAIR, ROWS
from support.spread_models import on_devices
from support.tiny_models import make_model, make_pair_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from jobs.commands.plan import Machines, run_plan
from jobs.commands.plan_cost import count_gpus
from jobs.families.simulated_devices import KIND, SimulatedDevices, simulated
from pipeline.attention import slots as slot_attention
from pipeline.attention.slots import SlotCache
from pipeline.cluster.placement import bundle_of, lay_out
from pipeline.config.drafts import DraftModelConfig
from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.reward_model import RewardModelJudge, settings_in_identity
from pipeline.hub import parallel_plans
from pipeline.hub.families import PLAIN, ServedFamily, read_table
from pipeline.hub.gpus import find_gpu
from pipeline.hub.parallel_plans import why_not_pipeline_parallel, why_not_tensor_parallel
from pipeline.protocol.capacity import capacity_for
from pipeline.protocol.memory import slots_that_fit
from pipeline.protocol.messages import MemoryBudget
from pipeline.protocol.spread import spread
from pipeline.runtime.assembly import assemble
from pipeline.runtime.local_hosts import start_hosts
from pipeline.runtime.memory_plan import device_type_of, lay_out_devices, plan_host, size_as_stated, size_of_source
from pipeline.runtime.topology import build_topology
from pipeline.sections import ModelConfig, ModelSizes
from pipeline.storage.fingerprint import take_fingerprint, without_later_keys
from pipeline.training.settings import TrainConfig
from pipeline.worker import layer_devices
from pipeline.worker.layer_devices import devices_of, place_model
from pipeline.worker.loading import load_language_model
from pipeline.worker.plain_runner import PlainRunner

DECODING = {"max_new_tokens": 4, "trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2}
FIRST, SECOND = simulated(0), simulated(1)


@pytest.fixture(autouse=True)
def _devices():
    with SimulatedDevices(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is decoded one row at a time")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with two layers."""
    return make_family(tmp_path_factory.mktemp("spread"), "llama")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_lora(folder / str(seed), model, "q_proj", "o_proj", "up_proj", seed=seed) for seed in (1, 2)]


def config_with(model, **principals):
    return config_of(str(model), principals, decoding=DECODING, cluster={"slots": 4})


@pytest.mark.parametrize("num_layers", [1, 2, 5, 7])
def test_the_fullest_device_holds_as_little_as_any_spread_leaves_it(num_layers):
    generator = torch.Generator().manual_seed(num_layers)
    for num_devices in range(1, num_layers + 1):
        for first_bytes in (0, 30, 200):
            sizes = torch.randint(1, 100, (num_layers,), generator=generator).tolist()
            counts = spread(sizes, num_devices, first_bytes=first_bytes)
            assert len(counts) == num_devices
            assert sum(counts) == num_layers
            assert min(counts) >= 1

            def fullest(stops, sizes=sizes, first_bytes=first_bytes):
                held = [sum(sizes[start:stop]) for start, stop in itertools.pairwise((0, *stops, len(sizes)))]
                return max(held[0] + first_bytes, *held[1:], 0)

            best = min(map(fullest, itertools.combinations(range(1, num_layers), num_devices - 1)))
            assert fullest(list(itertools.accumulate(counts))[:-1]) == best


def test_layers_that_are_alike_are_spread_evenly():
    assert spread([10] * 8, 4) == (2, 2, 2, 2)
    assert spread([10] * 8, 4, first_bytes=10) == (1, 2, 2, 3)  # the fullest has 30 either way


@pytest.mark.parametrize("attention", ["slots", pytest.param("plain", marks=pytest.mark.nightly)])
def test_answers_and_their_numbers_do_not_depend_on_the_number_of_devices(model, adapters, attention):
    """Prompted roles share prefixes, two adapters are mixed in passes, and a game is played over all of them."""
    tuned = {
        f"tuned{at}": {"kind": "arm", "adapter": str(each), "reference": "backbone", "weight": 0.5}
        for at, each in enumerate(adapters)
    }
    config = config_with(model, **PAIR, **tuned)
    one = on_devices(config, 1, attention=attention)
    two = on_devices(config, 2, attention=attention)
    expected = decode_with(*one, ROWS[:3], 2)
    assert decode_with(*two, ROWS[:3], 2) == expected
    of_cpu = decode(config, ROWS[:3])
    assert tokens_of(of_cpu) == tokens_of(expected)
    torch.testing.assert_close(numbers_of(of_cpu), numbers_of(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("family", "num_devices"),
    [
        ("gemma4_text", 3),  # layers of the second device read keys of the first one's
        ("gpt_oss", 2),  # a mixture of experts, with sinks and windows
        ("qwen3_next", 2),  # layers with states, and experts
        ("lfm3", 3),  # a first, a middle and a last device
        ("zamba2", 3),  # layers on both devices that share weights
        ("recurrent_gemma", 2),  # modules that keep states themselves
        ("gpt2", 2),  # a head whose weights are the embedding's
        ("xlm", 2),  # decoded row by row
    ],
)
def test_families_of_other_kinds_give_the_bits_of_one_device_in_any_batch(family, num_devices, tmp_path):
    folder = make_family(tmp_path, family)
    found = []
    for count in (1, num_devices):
        assembly, hosts = on_devices(config_with(folder, **PAIR), count)
        is_plain = isinstance(hosts.base.host._runner, PlainRunner)
        assert is_plain == (read_table().families[family].decoding == PLAIN)
        found.append([decode_with(assembly, hosts, ROWS[:3], slots) for slots in (1, 3)])
    assert found[0] == found[1]


def test_hosts_beside_the_base_are_spread_too(model, judge, tmp_path):
    """A reward model, heads beside adapters, and a model with tokens of its own."""
    valued = make_lora(tmp_path / "valued", model, "q_proj", "down_proj", seed=3)
    save_file({"weight": random(1, 64, seed=1), "bias": torch.ones(1)}, valued / "value_head.safetensors")
    other = make_model(tmp_path / "other", tokenizer=make_pair_tokenizer(), seed=3)
    principals = {
        "judge": {"kind": "reward_model", "model": {"model": str(judge())}, "weight": 0.5},
        "text": {"kind": "arm", "model": {"model": str(other)}, "reference": "none", "weight": 0.1},
        "worth": {"kind": "value", "model": str(model), "adapter": str(valued), "candidates": 5, "weight": 0.4},
    }
    decoding = {**DECODING, "candidates": 8}
    config = config_of(str(model), principals, decoding=decoding, cluster={"slots": 2})
    one, two = (decode_with(*on_devices(config, count), ROWS[:3], 2) for count in (1, 2))
    assert one == two


@pytest.mark.parametrize("attention", ["slots", "plain"])
def test_an_adapter_at_each_rows_own_weights_is_mixed_on_every_device(model, tmp_path, attention):
    adapter = str(make_preference_adapter(tmp_path / "parm", model, targets=("q_proj", "down_proj")))
    principals = {
        name: {"kind": "preference_arm", "adapter": adapter, "objective": number, "weight": 0.5}
        for number, name in enumerate(("kind", "brief"))
    }
    rows = [replace(row, weights={"kind": at / 4, "brief": 1 - at / 4}) for at, row in enumerate(ROWS[:4])]
    config = config_of(str(model), principals, decoding={**DECODING, "rule": "parm"}, cluster={"slots": 4})
    one, two = (decode_with(*on_devices(config, count, attention=attention), rows, 4) for count in (1, 2))
    assert one == two
    assert tokens_of(one) == tokens_of(decode(config, rows))


def test_passes_of_fixed_shapes_give_the_bits_of_one_device(model):
    """On a GPU passes have two shapes; with several devices they are computed and not captured."""
    logits = []
    for count in (1, 2):
        spec = replace(spec_of(model), device=KIND, pipeline_parallel=count)
        runner = load_in_slots(spec, has_fixed_shapes=True)
        assert runner._passes._captured_passes is not None
        assert runner._passes._is_whole == (count == 1)
        found = [logits_after(runner, places, CHANGING_PROMPTS) for places in CHANGING_BATCHES]
        logits.append([each.cpu() for batch in found for each in batch.values()])
    assert len(logits[0]) == sum(map(len, CHANGING_BATCHES))
    assert all(map(torch.equal, *logits))


def test_each_layers_weights_and_cache_are_on_its_device_and_the_rest_is_on_the_first(model):
    runner = load_in_slots(replace(spec_of(model), device=KIND, pipeline_parallel=2))
    logits_after(runner, {0: 0}, [[3, 4, 5]])
    own = runner._passes._model
    assert devices_of(own) == (FIRST, SECOND)
    assert {weight.device for weight in own.model.layers[0].parameters()} == {FIRST}
    assert {weight.device for weight in own.model.layers[1].parameters()} == {SECOND}
    assert own.lm_head.weight.device == own.model.norm.weight.device == FIRST
    assert [each.device for each in runner._cache.keys] == [FIRST, SECOND]
    assert [each.device for each in runner._cache.values] == [FIRST, SECOND]


def test_weights_that_layers_of_two_devices_share_are_copied_and_others_stay_shared(tmp_path):
    made = AutoModelForCausalLM.from_pretrained(make_family(tmp_path / "gpt2", "gpt2"))
    made.tie_weights()
    made.lm_head.weight = made.transformer.wte.weight
    made.transformer.h[1].ln_1 = made.transformer.h[0].ln_1
    place_model(made, (FIRST, SECOND), "model")
    assert made.lm_head.weight is made.transformer.wte.weight
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    made.transformer.h[1].ln_1.weight = made.transformer.h[0].ln_1.weight
    shared = made.transformer.h[0].ln_1.weight.detach().clone()
    place_model(made, (FIRST, SECOND), "model")
    one, other = (layer.ln_1.weight for layer in made.transformer.h)
    assert (one.device, other.device) == (FIRST, SECOND)
    assert torch.equal(one.cpu(), shared)
    assert torch.equal(other.cpu(), shared)


def hold_on_the_first_device(monkeypatch):
    hold = SlotCache.hold

    def held(self, layer, key_GTD, value_GTD, num_tokens):
        return hold(self, layer, key_GTD.to(FIRST), value_GTD.to(FIRST), num_tokens)

    monkeypatch.setattr(SlotCache, "hold", held)


def leave_rows_on_the_first_device(monkeypatch):
    monkeypatch.setattr(slot_attention._ActivePass, "on", lambda self, device: self.slot_pass)


def leave_inputs_where_they_are(monkeypatch):
    monkeypatch.setattr(layer_devices._InputsTo, "__call__", lambda self, module, args, kwargs: (args, kwargs))


def leave_outputs_where_they_are(monkeypatch):
    monkeypatch.setattr(layer_devices._OutputTo, "__call__", lambda self, module, args, output: output)


@pytest.mark.parametrize(
    "fault",
    [
        hold_on_the_first_device,
        leave_rows_on_the_first_device,
        leave_inputs_where_they_are,
        leave_outputs_where_they_are,
    ],
)
def test_a_tensor_on_the_wrong_device_is_noticed(model, fault, monkeypatch):
    spec = replace(spec_of(model), device=KIND, pipeline_parallel=2, attention="slots")
    load_language_model(spec)
    fault(monkeypatch)
    with pytest.raises(ConfigurationError, match="on one device; found simulated:0, simulated:1"):
        load_language_model(spec)


def test_a_model_whose_code_between_layers_brings_two_devices_together_is_refused(tmp_path, monkeypatch):
    """Hidden states between two layers of the second device, and rotations, which are on the first."""
    source = make_family(tmp_path / "two", "llama")
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = 4
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "four")
    call = LlamaDecoderLayer.__call__

    def mixed(self, hidden, **given):
        return call(self, hidden + given["position_embeddings"][0][..., :1], **given)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", mixed)
    spec = replace(spec_of(tmp_path / "four"), device=KIND, attention="plain")
    load_language_model(spec)
    with pytest.raises(ConfigurationError, match=r"own forward pass over text fails.*on one device; found"):
        load_language_model(replace(spec, pipeline_parallel=2))


def test_simulated_tensors_of_two_devices_do_not_meet_and_are_copied_when_they_move():
    one, other = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
    meetings = [lambda: one + other, lambda: torch.cat([one, other]), lambda: one.add_(other), lambda: one[other > 0]]
    for meet in meetings:
        with pytest.raises(RuntimeError, match="all tensors must be on one device"):
            meet()
    with pytest.raises(RuntimeError, match="all tensors must be on one device"):
        one + torch.ones(2)
    assert (one * torch.tensor(2.0)).tolist() == [2.0, 2.0]  # a single number may be on the CPU
    assert (one[[1]].tolist(), one[[]].tolist()) == ([1.0], [])  # as may indices
    moved = one.to(SECOND)
    moved.zero_()
    assert (moved.device, one.tolist()) == (SECOND, [1.0, 1.0])
    assert one.to(FIRST) is not moved


def test_a_budget_counts_each_devices_own_layers_and_the_least_device_decides(model):
    def budgets(count):
        runner = load_in_slots(replace(spec_of(model), device=KIND, pipeline_parallel=count))
        budget = runner.memory_budget(100)
        return (budget, *budget.others), runner

    ((whole,), runner), ((first, second), _) = budgets(1), budgets(2)
    keys = 2 * capacity_for(100) * sum(runner._bytes_per_token.values())  # of two roles
    assert keys > 0
    assert first.slot_bytes == second.slot_bytes == whole.slot_bytes - keys // 2
    least = MemoryBudget("b", "cuda", 10, 100)
    assert slots_that_fit([MemoryBudget("a", "cuda", 10, 10_000, others=(least,))]) == 8  # 0.85 of 100


def test_states_and_keys_are_counted_where_their_layers_are(tmp_path):
    spec = replace(spec_of(make_family(tmp_path, "qwen3_next")), device=KIND, pipeline_parallel=2)
    runner = load_language_model(spec).runner
    row = runner._row_bytes
    kinds = AutoModelForCausalLM.from_pretrained(tmp_path).config.layer_types
    assert kinds == ["linear_attention", "full_attention"]
    assert set(row.states) == {FIRST}
    assert set(row.per_token) == {SECOND}
    budget = runner.memory_budget(100)
    assert budget.slot_bytes != budget.others[0].slot_bytes


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_plan_reckons_each_device_as_the_loaded_host_does(family, tmp_path):
    config = config_with(make_family(tmp_path, family), **PAIR)
    (spec,) = on_devices(config, 2)[0].hosts
    budget = load_language_model(spec).runner.memory_budget(200)
    [plan] = build_topology(config).hosts
    plan = replace(plan, model=plan.model.model_copy(update={"pipeline_parallel": 2}))
    sized = size_of_source(spec.source)
    facts = replace(sized.facts, context_length=200)
    host = plan_host(plan, replace(sized, facts=facts), config, device_type="cpu", source=spec.source)
    planned = [(stage.memory.slot_bytes, stage.memory.reserved_bytes) for stage in host.stages]
    found = [(each.slot_bytes, each.reserved_bytes) for each in (budget, *budget.others)]
    if family == "llama":
        assert planned == found
    else:  # layers differ, and are reckoned as if all were alike
        assert sum(slot for slot, _ in planned) == pytest.approx(sum(slot for slot, _ in found), rel=1e-3)


SIZES = {"layers": 10, "hidden_size": 1024, "intermediate_size": 4096, "heads": 16, "vocab_size": 50_000}


@pytest.mark.parametrize("transport", ["ray", "local"])
def test_a_plan_lays_out_each_devices_part(transport):
    base = {"model": "m", "pipeline_parallel": 4}
    config = config_of(base, decoding={"max_new_tokens": 100}, cluster={"transport": transport, "slots": 4})
    [plan] = build_topology(config).hosts
    assert device_type_of(plan.model, None) == "cuda"
    host = plan_host(plan, size_as_stated(ModelSizes(**SIZES)), config, device_type="cuda")
    devices = lay_out_devices([host], config, gpu=find_gpu("a100-80gb"))
    assert len(devices) == 4 == count_gpus([host], config)
    assert sum(device.weight_bytes for device in devices) == pytest.approx(host.weight_bytes, rel=1e-3)
    embeddings, of_layer = 2 * 2 * 50_000 * 1024, 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert devices[0].weight_bytes == pytest.approx(embeddings + of_layer, rel=0.01)  # with one layer
    assert devices[1].weight_bytes == pytest.approx(3 * of_layer, rel=0.01)


def test_a_plan_says_that_layers_are_spread_and_what_that_leaves_out(model, tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl")
    file = tmp_path / "job.yaml"
    file.write_text(
        f"input: {{path: {tmp_path}/prompts.jsonl}}\noutput: {{path: {tmp_path}/run}}\n"
        f"base: {{model: {model}, pipeline_parallel: 2}}\n"
    )
    run_plan(file, [], Machines(gpu=find_gpu("a100-80gb")))
    shown = capsys.readouterr().out
    assert "the layers of base are spread over 2 GPUs of one process, which compute one after another" in shown
    assert re.search(r"^base +auto +1 +2 ", shown, re.MULTILINE)
    assert re.search(r"^a100-80gb 2 +80 GB +base ", shown, re.MULTILINE)


def test_a_process_reserves_as_many_gpus_as_its_layers_are_spread_over():
    [plan] = build_topology(config_of({"model": "m", "pipeline_parallel": 3, "resources": {"num_cpus": 2}})).hosts
    assert bundle_of(plan, has_gpus=False) == {"CPU": 2.0, "GPU": 3.0}
    bundles, (place,) = lay_out([plan], [{"CPU": 8.0, "GPU": 2.0}], has_gpus=True)
    assert bundles == [{"CPU": 2.0, "GPU": 3.0}]
    assert (place.each_rank, place.bundles) == (bundles[0], (0,))


def test_the_first_layers_of_a_base_propose_in_one_process():
    base = config_of({"model": "m", "pipeline_parallel": 2}).base
    section = DraftModelConfig(layers=1).section(base)
    assert (section.device, section.pipeline_parallel) == ("auto", 1)


def test_models_whose_layers_are_spread_otherwise_are_other_hosts():
    arm = {"kind": "arm", "model": {"model": "m", "pipeline_parallel": 2}, "reference": "none"}
    assert len(build_topology(config_of({"model": "m"}, {"arm": arm})).hosts) == 2
    assert len(build_topology(config_of({"model": "m", "pipeline_parallel": 2}, {"arm": arm})).hosts) == 1


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"pipeline_parallel": 0}, "greater than or equal to 1"),
        ({"tensor_parallel": 2}, "set tensor_parallel or pipeline_parallel to 1; got 2 and 2"),
        ({"device": "cpu"}, "with device: cpu it must be 1; got 2"),
        ({"resources": {"num_gpus": 1}}, "with pipeline_parallel: 2 num_gpus must be null or 2; got 1"),
        ({"resources": {"num_gpus": 0}}, "with pipeline_parallel: 2 num_gpus must be null or 2; got 0"),
        ({"quantization": "bnb-4bit"}, r"leave out quantization \(bnb-4bit\), or set pipeline_parallel to 1; got 2"),
    ],
)
def test_settings_that_contradict_it_are_refused_in_one_line(section, says):
    with pytest.raises(ConfigurationError, match=says):
        config_of({"model": "m", "pipeline_parallel": 2, **section})
    config_of({"model": "m", "pipeline_parallel": 2, "device": "cuda:1", "resources": {"num_gpus": 2}})


def test_what_cannot_be_spread_is_refused_by_name_before_weights_are_loaded(model, tmp_path):
    with pytest.raises(
        ConfigurationError, match="it has 2 layers, and each device has at least one; use pipeline_parallel: 2"
    ):
        assemble(config_of({"model": str(model), "pipeline_parallel": 3}), NOWHERE)
    for device, words in (("auto", "2 GPUs"), ("cuda", "2 GPUs"), ("cuda:1", "2 GPUs from cuda:1 on")):
        assembly = assemble(config_of({"model": str(model), "device": device, "pipeline_parallel": 2}), NOWHERE)
        if torch.cuda.device_count() < 2:
            with pytest.raises(ConfigurationError, match=rf"pipeline_parallel: 2 needs {words}, and torch finds \d;"):
                start_hosts(assembly)
    config = {**json.loads((model / "config.json").read_text()), "quantization_config": {"quant_method": "gptq"}}
    assert "quantised weights are not spread" in why_not_pipeline_parallel(config, 2, 2)
    with pytest.raises(ConfigurationError, match="must be at most the number of its layers, 2; got 3"):
        place_model(AutoModelForCausalLM.from_pretrained(model), [torch.device("cpu")] * 3, "model m")


def test_a_family_that_two_devices_decoded_otherwise_would_be_refused_and_others_that_are_refused_keep_their_reason(
    monkeypatch,
):
    assert why_not_tensor_parallel({"model_type": "moshi"}, 2) is None  # it makes audio
    assert why_not_pipeline_parallel({"model_type": "moshi"}, 4, 2) is None
    odd = ServedFamily("slots", reasons={"pipeline_parallel": "two devices give other bits than one"})
    monkeypatch.setattr(parallel_plans, "family_named", lambda name: odd)
    assert "two devices give other bits than one; use a device" in why_not_pipeline_parallel({}, 4, 2)
    assert why_not_pipeline_parallel({"auto_map": {}}, 4, 2) is None  # code of its own is tried at load


def test_families_without_a_tensor_parallel_plan_are_told_of_this_way(tmp_path):
    folder = make_family(tmp_path, "gpt2")
    with pytest.raises(ConfigurationError, match="use pipeline_parallel: N, which spreads whole layers over N GPUs"):
        assemble(config_of({"model": str(folder), "tensor_parallel": 2}), NOWHERE)


def test_trainings_and_judges_refuse_it():
    split = {"model": "m", "pipeline_parallel": 2}
    data = {"input": {"path": "pairs.jsonl"}, "output": {"path": "out"}}
    with pytest.raises(ValidationError, match=r"base\n.*pipeline_parallel must be 1 here"):
        TrainConfig.model_validate({**data, "base": split})
    with pytest.raises(ValidationError, match="pipeline_parallel must be 1 here"):
        RewardModelJudge.model_validate({"kind": "reward_model", "model": split})
    plain = TrainConfig.model_validate({**data, "base": "m"})
    assert not any("pipeline_parallel" in name for name in plain.fields())  # adapters of before are not trained anew
    assert "pipeline_parallel" not in settings_in_identity(ModelConfig(model="m").model_dump(mode="json"))


def test_the_number_of_devices_is_part_of_a_fingerprint_and_one_is_as_before():
    def fields(count):
        config = config_of({"model": "m", "pipeline_parallel": count})
        return without_later_keys(take_fingerprint(config, {}, {}, ()))

    assert fields(2) == {**fields(1), "base.pipeline_parallel": 2}
    assert "base.pipeline_parallel" not in fields(1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma4_text", "qwen3_next"])
def test_on_gpus_two_devices_give_the_bits_of_one_in_any_batch_and_the_tokens_of_a_cpu(family, tmp_path):
    decoding = {**DECODING, "max_new_tokens": 8}
    config = config_of(make_family(tmp_path, family), PAIR, decoding=decoding, cluster={"slots": 4})
    two = on_devices(config, 2, kind="cuda")
    found = decode_with(*two, ROWS, 4)
    assert tokens_of(found) == tokens_of(decode(config, ROWS))
    for slots, rows in ((1, ROWS[3:5]), (3, ROWS[::-1]), (9, ROWS)):
        again = decode_with(*two, rows, slots)
        assert again == {name: found[name] for name in again}
