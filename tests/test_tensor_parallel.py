"""Hosts whose weights are split over several processes of this machine, with real collectives between them."""

from __future__ import annotations

import gc
import re
import signal

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from support.decoding import NOWHERE, config_of
from support.lora import make_lora
from support.rank_groups import decode_with, make_divisible, numbers_of, tokens_of
from support.runs import write_prompts
from support.sampling_hosts import PAIR, ROWS
from support.tiny_models import make_model, make_pair_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from jobs.commands.plan import run_plan
from pipeline.errors import ConfigurationError, HostError
from pipeline.evaluation.judges.llm import LlmJudge
from pipeline.evaluation.judges.reward_model import RewardModelJudge, settings_in_identity
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_again, start_hosts
from pipeline.runtime.rank_groups import RankGroupHost
from pipeline.runtime.wiring import unwrapped
from pipeline.sections import ModelConfig
from pipeline.training.settings import TrainConfig
from pipeline.worker.weights import why_not_finite

DECODING = {"max_new_tokens": 8, "trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_divisible(tmp_path_factory.mktemp("divisible"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model):
    return make_lora(tmp_path_factory.mktemp("adapter"), model, "q_proj", "o_proj", "down_proj", "up_proj")


def config_with(model, adapter, num_ranks, **cluster):
    """A prompted principal and one with an adapter of column- and row-wise split layers, on one host."""
    tuned = {"kind": "arm", "adapter": str(adapter), "reference": "backbone", "weight": 0.5}
    base = {"model": str(model), "tensor_parallel": num_ranks}
    return config_of(
        base, {**PAIR, "tuned": tuned}, decoding=DECODING, cluster={"transport": "local", "slots": 4, **cluster}
    )


def open_hosts(config):
    assembly = assemble(config, NOWHERE)
    return assembly, start_hosts(assembly)


@pytest.fixture(scope="module")
def expected(model, adapter):
    """What one process answers."""
    assembly, hosts = open_hosts(config_with(model, adapter, 1))
    return decode_with(assembly, hosts, ROWS, 4)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly)])
def group(request, model, adapter):
    """The same host split over two and over three ranks."""
    assembly, hosts = open_hosts(config_with(model, adapter, request.param, step_timeout_s=10))
    yield assembly, hosts
    hosts.base.close()


def test_ranks_answer_as_one_process_does_token_for_token(group, expected):
    found = decode_with(*group, ROWS, 4)
    assert tokens_of(found) == tokens_of(expected)
    torch.testing.assert_close(numbers_of(found), numbers_of(expected), atol=1e-3, rtol=0)
    assert numbers_of(found) != numbers_of(expected)  # sums of parts: other last bits


def test_bits_of_a_row_depend_on_the_number_of_ranks_alone(group):
    found = decode_with(*group, ROWS, 4)
    for slots, rows in ((1, ROWS[3:5]), (3, ROWS[::-1]), (9, ROWS)):
        again = decode_with(*group, rows, slots)
        assert again == {name: found[name] for name in again}


def test_each_rank_holds_its_own_heads(group, model, adapter):
    assembly, hosts = group
    budgets = hosts.base.memory_budgets(1000).result()
    _, whole = open_hosts(config_with(model, adapter, 1))
    (alone,) = whole.base.memory_budgets(1000).result()
    assert len(budgets) == assembly.hosts[0].tensor_parallel
    assert {budget.place for budget in budgets} == {alone.place}
    keys = 2 * 2 * 48 * 4 * 1024 * 4  # keys and values, layers, width, roles, tokens, bytes
    saved = keys - keys // len(budgets)
    assert {budget.slot_bytes for budget in budgets} == {alone.slot_bytes - saved}


def test_scores_of_an_existing_answer_are_those_of_one_process(group, model, adapter):
    prompts = {role.name: [9, 8, 7] for role in group[0].topology.hosts[0].roles}
    _, whole = open_hosts(config_with(model, adapter, 1))
    alone = whole.base.score(prompts, [11, 12, 13]).result()
    torch.testing.assert_close(group[1].base.score(prompts, [11, 12, 13]).result(), alone, atol=1e-3, rtol=0)


@pytest.mark.parametrize("group", [2], indirect=True)
@pytest.mark.parametrize(
    ("sign", "says"),
    [
        (signal.SIGKILL, r"rank 1 ended \(signal 9\)"),
        pytest.param(signal.SIGSTOP, "no answer of rank 0, 1", marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_is_killed_or_hangs_is_a_failed_host_and_the_group_starts_again(group, sign, says):
    assembly, hosts = group
    undisturbed = decode_with(assembly, hosts, ROWS[:4], 4)
    engine, ranks = make_engine(assembly, hosts), hosts.base.processes
    for row in ROWS[:4]:
        engine.admit(row, 0, 0)
    for _ in range(3):
        assert not engine.step()
    ranks[1].send_signal(sign)
    with pytest.raises(HostError, match=rf"host base .*{says}") as caught:
        run_to_the_end(engine)
    assert all(rank.poll() is not None for rank in ranks)  # none is left behind
    with pytest.raises(HostError, match="its ranks were ended"):
        hosts.base.resize(4).result()
    assert start_again(hosts, assembly)
    engine.recover(hosts, caught.value)
    assert run_to_the_end(engine) == undisturbed
    assert not start_again(hosts, assembly)


def run_to_the_end(engine):
    found = {}
    while not engine.is_idle:
        found |= {record.row_id: record for record in engine.step()}
    return found


@pytest.mark.nightly
def test_a_reward_model_and_a_model_with_other_tokens_are_split_beside_a_base_that_is_not(tiny, judge, tmp_path):
    other = make_model(tmp_path / "other", tokenizer=make_pair_tokenizer(), seed=3)

    def decoded(num_ranks):
        split = {"tensor_parallel": num_ranks}
        principals = {
            "judge": {"kind": "reward_model", "model": {"model": str(judge()), **split}, "weight": 0.5},
            "text": {"kind": "arm", "model": {"model": str(other), **split}, "reference": "none", "weight": 0.1},
        }
        decoding = {**DECODING, "max_new_tokens": 5, "candidates": 8}
        assembly, hosts = open_hosts(config_of(tiny(), principals, decoding=decoding, cluster={"slots": 2}))
        assert [spec.tensor_parallel for spec in assembly.hosts] == [1, num_ranks, num_ranks]
        found = [decode_with(assembly, hosts, ROWS[:3], slots) for slots in ((2, 3) if num_ranks > 1 else (2,))]
        for host in hosts.others if num_ranks > 1 else ():
            host.close()
        return found

    (alone,), (split, again) = decoded(1), decoded(2)
    assert tokens_of(split) == tokens_of(alone)
    torch.testing.assert_close(numbers_of(split), numbers_of(alone), atol=1e-3, rtol=0)
    assert again == split


def test_a_group_that_nobody_uses_ends(model):
    config = config_of({"model": str(model), "tensor_parallel": 2})
    assembly = assemble(config, NOWHERE)
    (spec,), (plan,) = assembly.hosts, assembly.topology.hosts
    host = RankGroupHost(spec, plan, unwrapped, start_timeout_s=60, step_timeout_s=60)
    processes = host.processes
    del host
    gc.collect()
    assert all(process.wait(20) is not None for process in processes)


def test_what_cannot_be_split_is_refused_by_name_before_weights_are_loaded(tiny, model, tmp_path):
    narrow = make_divisible(tmp_path / "narrow", num_kv_heads=1)
    for folder, num_ranks, says in (
        (model, 4, "its num_attention_heads, 6, cannot be divided by tensor_parallel: 4"),
        (narrow, 2, "its num_key_value_heads, 1, cannot be divided by tensor_parallel: 2"),
        (
            tiny("gpt2"),
            2,
            "architecture gpt2, cannot be split over 2 ranks: transformers has no tensor parallel plan",
        ),
    ):
        with pytest.raises(ConfigurationError, match=says):
            assemble(config_of({"model": str(folder), "tensor_parallel": num_ranks}), NOWHERE)
    with pytest.raises(ConfigurationError, match=r"num_gpus must be null, 0 or 1; got 0.5"):
        config_of({"model": str(model), "tensor_parallel": 2, "resources": {"num_gpus": 0.5}})
    with pytest.raises(ConfigurationError, match=r"not split over ranks: leave out quantization \(bnb-4bit\)"):
        config_of({"model": str(model), "tensor_parallel": 2, "quantization": "bnb-4bit"})


def test_a_rank_looks_for_nan_in_its_part_of_a_split_weight():
    layer = torch.nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer.weight = torch.nn.Parameter(
            distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        )
        assert "1 weight (weight) with numbers that are NaN" in why_not_finite(layer)
    finally:
        dist.destroy_process_group()


def test_a_plan_says_what_is_split_and_into_how_many_processes(model, tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl")
    file = tmp_path / "job.yaml"
    file.write_text(
        f"input: {{path: {tmp_path}/prompts.jsonl}}\noutput: {{path: {tmp_path}/run}}\n"
        f"base: {{model: {model}, tensor_parallel: 2, resources: {{num_cpus: 2}}}}\n"
    )
    run_plan(file, [])
    shown = capsys.readouterr().out
    assert "base is split over 2 processes, each with its part of every layer; on one machine where" in shown
    assert re.search(r"^base +auto +2 x 2 +2 x auto ", shown, re.MULTILINE)
    run_plan(file, ["cluster.transport=local"])
    assert "layer and a GPU of its own where there are GPUs" in capsys.readouterr().out


def test_trainings_and_judges_refuse_ranks_that_they_would_not_start(model):
    split = {"model": str(model), "tensor_parallel": 2}
    data = {"input": {"path": "pairs.jsonl"}, "output": {"path": "out"}}
    with pytest.raises(ValidationError, match=r"base\n.*tensor_parallel must be 1 here"):
        TrainConfig.model_validate({**data, "base": split})
    with pytest.raises(ValidationError, match="tensor_parallel must be 1 here"):
        RewardModelJudge.model_validate({"kind": "reward_model", "model": split})
    with pytest.raises(ValidationError, match="tensor_parallel must be 1 here"):
        LlmJudge.model_validate({"kind": "llm", "rubric": "good?", "model": split})
    plain = TrainConfig.model_validate({**data, "base": str(model)})
    assert not any("tensor_parallel" in name for name in plain.fields())  # adapters of before are not trained anew
    assert not any("sizes" in name for name in plain.fields())


def test_a_judges_scores_of_before_stay_valid_and_do_not_depend_on_what_plans_reckon_with():
    section = {"model": "m", "dtype": "float32", "attention": "auto", "trust_remote_code": False}
    sizes = {"layers": 2, "hidden_size": 64, "intermediate_size": 128, "heads": 4, "vocab_size": 100}
    judged = {key: value for key, value in section.items() if key != "model"}
    assert settings_in_identity(ModelConfig(**section, sizes=sizes).model_dump(mode="json")) == judged
    quantised = ModelConfig(**section, quantization="bnb-4bit").model_dump(mode="json")
    assert settings_in_identity(quantised) == {**judged, "quantization": {"kind": "bnb-4bit"}}
