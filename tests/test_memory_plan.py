"""What `cage plan` says about memory, time and cost: against what is allocated, and against sums by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.commands import cage
from support.decoding import NOWHERE, config_of, engine_of
from support.language_models import ROLES, VOCAB_SIZE, spec_of
from support.quantised_checkpoints import WRITTEN, write_pair
from support.runs import write_prompts
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from jobs.commands.plan_cost import Throughput, count_gpus, describe_cost, find_throughput
from jobs.commands.plan_memory import describe_devices
from jobs.commands.plan_stated import Findings, describe_stated, plan_stated_hosts
from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.hub.gpus import GPUS, find_gpu
from pipeline.hub.packages import is_installed
from pipeline.hub.parameters import count_parameters, count_stated
from pipeline.hub.sources import resolve_model
from pipeline.protocol.capacity import capacity_for
from pipeline.protocol.memory import LONG_PROMPT, HostMemory, PassSizes, logits_bytes, memory_of_host
from pipeline.protocol.messages import Admission, Step
from pipeline.runtime.drafts import draft_host, draft_section
from pipeline.runtime.memory_plan import (
    PlannedHost,
    first_layers,
    lay_out_devices,
    plan_host,
    size_as_stated,
    size_of_source,
    weights_of,
)
from pipeline.runtime.replica_plan import plan_replica, resolve_models
from pipeline.runtime.topology import build_topology
from pipeline.sections import ModelConfig, ModelSizes
from pipeline.storage.commits import CommitRecord
from pipeline.storage.pace import measure_pace
from pipeline.worker.loading import load_language_model
from pipeline.worker.weights import load_causal_lm

Tiny = Callable[..., Path]
GB = 10**9
LLAMA_65B = ModelSizes(layers=80, hidden_size=8192, intermediate_size=22016, heads=64, vocab_size=32000)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Everything that a model holds, the states of bitsandbytes' weights included, each once."""
    yield from {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.state2.absmax, state.state2.code)


def held_bytes(model: nn.Module) -> int:
    return sum(each.nbytes for each in tensors_of(model))


@pytest.mark.parametrize(
    "name", ["float32", "bfloat16", "bnb-4bit", "fp8", "mxfp4", "mxfp8", "metal", "compressed-tensors int4"]
)
def test_weights_take_what_the_plan_says(tiny: Tiny, tmp_path: Path, name: str) -> None:
    dtype, kind, folder = "float32", None, tiny()
    if name == "bnb-4bit":
        kind = name
        if not is_installed("bitsandbytes"):
            pytest.skip("bitsandbytes is not installed")
    elif name in WRITTEN:
        if name.startswith("compressed") and not is_installed("compressed_tensors"):
            pytest.skip("compressed-tensors is not installed")
        source = _experts(tmp_path / "source") if name == "mxfp4" else tiny()
        folder, _ = write_pair(source, tmp_path, *WRITTEN[name])
    else:
        dtype = name
    config = ModelConfig(model=str(folder), quantization=kind)  # type: ignore[arg-type]
    source_ = resolve_model(str(folder), cache_folder=tmp_path, quantization=kind)  # type: ignore[arg-type]
    spec = replace(spec_of(folder), source=source_)
    found = held_bytes(load_causal_lm(spec, dtype=getattr(torch, dtype)))
    planned = sum(weights_of(size_of_source(source_), config, dtype, "cpu").values())
    # tables of codes and offsets, which large models do not notice
    slack = 14 * (2 * 256 * 4 + 512) if kind else 4096
    assert abs(planned - found) <= 0.02 * found + slack, (planned, found)


def _experts(folder: Path) -> Path:
    from test_quantised import gpt_oss

    return gpt_oss(folder)


def test_a_slots_buffers_and_a_pass_take_what_the_plan_says(tiny: Tiny) -> None:
    """Rows of 300 tokens in four slots of two roles: their buffers exactly; a pass at most, and at least a third."""
    runner = load_language_model(spec_of(tiny(), num_slots=4)).slot_runner
    assert runner is not None

    def admit(first: int) -> int:
        rows = {
            slot: {role.name: [first + slot, at, *[7] * 288] for at, role in enumerate(ROLES)} for slot in range(4)
        }
        runner.advance(Step([Admission(slot, prompts) for slot, prompts in rows.items()]))
        return sum(len(prompt) for prompts in rows.values() for prompt in prompts.values())

    admit(10)
    held = sum(each.nbytes for each in (*runner._cache.keys, *runner._cache.values))
    num_rows = 4 * len(ROLES)
    of_row = capacity_for(300) * runner.cache_bytes_per_token.total()
    assert held == (num_rows + 1) * of_row  # and one row for padding
    sizes = runner._passes.sizes
    assert runner.memory_budget(300).slot_bytes == len(ROLES) * (
        of_row + sizes.token_bytes + logits_bytes(VOCAB_SIZE)
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        num_tokens = admit(20)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    most = num_tokens * sizes.token_bytes + num_rows * logits_bytes(VOCAB_SIZE)
    assert most / 3 <= peak <= most


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_plan_and_a_loaded_host_reckon_the_same(tiny: Tiny, judge: Tiny, kind: str) -> None:
    principals: dict[str, Any] = {"kind": {"kind": "prompted", "principle": "be kind"}}
    if kind == "llama":
        principals["judge"] = {"kind": "reward_model", "model": str(judge()), "candidates": 7}
    config = config_of(tiny(kind), principals, cluster={"transport": "local", "slots": 2})
    engine, _ = engine_of(config)
    planned = planned_hosts(config)
    row_tokens = LONG_PROMPT + config.decoding.max_new_tokens
    for host, client in zip(planned, engine.calls.hosts.all, strict=True):
        (budget,) = client.memory_budgets(min(row_tokens, 512)).result()  # the tiny models' context
        assert HostMemory(budget.slot_bytes, budget.reserved_bytes) == host.memory


def planned_hosts(config: Config) -> list[PlannedHost]:
    replica = plan_replica(config, resolve_models(config, NOWHERE), NOWHERE)
    return [
        plan_host(
            plan,
            size_of_source(spec.source),
            config,
            device_type="cpu",
            source=spec.source,
            drafts=spec.drafts.are_on("cpu"),
        )
        for plan, spec in zip(replica.topology.hosts, replica.hosts, strict=True)
    ]


def test_parameters_are_counted_from_the_configuration(tiny: Tiny) -> None:
    source = resolve_model(str(tiny()), cache_folder=NOWHERE)
    counts = count_parameters(source)
    assert counts.total == sum(source.num_parameters_by_dtype.values())
    assert counts.in_linears == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert counts.largest == 64 * 128
    vocab = len(tiny_models.make_tokenizer())
    sizes = ModelSizes(
        layers=2, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2, vocab_size=vocab, is_tied=False
    )
    assert count_stated(sizes) == counts
    assert count_stated(LLAMA_65B).total == pytest.approx(65.29e9, rel=1e-3)


def test_ranks_share_the_cache() -> None:
    sizes = {"num_roles": 1, "row_tokens": 1280, "cache_bytes_per_token": 1000}
    passes = PassSizes(64, 128, 128, 1000, 2)
    one, two = (memory_of_host(passes, **sizes, num_ranks=ranks) for ranks in (1, 2))
    assert one.slot_bytes - two.slot_bytes == 1536 * 1000 // 2


def planned_host(
    num_gpus: float | None, weight_bytes: int, *, name: str = "base", device: str = "cuda", slot_bytes: int = GB
) -> PlannedHost:
    config = config_of({"model": "m", "device": device, "resources": {"num_gpus": num_gpus}})
    [plan] = build_topology(config).hosts
    return PlannedHost(
        replace(plan, name=name), "cuda", "bfloat16", {"bfloat16": weight_bytes}, HostMemory(slot_bytes, GB)
    )


def on_ray(**cluster: Any) -> Config:
    return config_of("m", cluster={"transport": "ray", "slots": 4, **cluster})


def test_shares_of_a_gpu_are_filled_and_replicas_take_their_own() -> None:
    gpu = find_gpu("a100-80gb")
    hosts = [planned_host(1, 40 * GB), planned_host(0.5, 10 * GB, name="a"), planned_host(0.25, 2 * GB, name="b")]
    devices = lay_out_devices(hosts, on_ray(replicas=2), gpu=gpu)
    assert [[host.plan.name for host in device.hosts] for device in devices] == [
        ["base"],
        ["a", "b", "b"],
        ["base"],
        ["a"],
    ]
    assert devices[1].weight_bytes == 14 * GB
    # 0.85 of what is free beside the weights, less a pass of each host, over a slot of each
    assert devices[0].num_fitting == int(0.85 * 40 - 1)
    assert devices[1].num_fitting == int((0.85 * (80 - 14) - 3) // 3)
    text = describe_devices(hosts, on_ray(replicas=2, slots="auto"), gpu, None)
    assert "a, 2 x b" in text
    assert "slots: auto becomes 17" in text


def test_local_hosts_are_on_the_device_that_they_name() -> None:
    hosts = [planned_host(None, GB, device="cuda:1"), planned_host(None, GB, name="a", device="auto")]
    devices = lay_out_devices(hosts, config_of("m", cluster={"transport": "local"}), gpu=find_gpu("l4-24gb"))
    assert [[host.plan.name for host in device.hosts] for device in devices] == [["a"], ["base"]]


@pytest.mark.parametrize(
    ("weight_bytes", "slot_bytes", "slots", "says"),
    [
        (40 * GB, GB, 33, None),
        (
            40 * GB,
            GB,
            64,
            r"64 slots do not fit; set cluster\.slots=33 \(or auto\), or lower decoding\.max_new_tokens",
        ),
        (130 * GB, GB, 4, r"not one slot fits: 130 GB of weights.*quantise base \(quantization: bnb-4bit"),
        (40 * GB, 50 * GB, "auto", r"not one slot fits.*lower decoding\.max_new_tokens \(256\)"),
    ],
)
def test_what_does_not_fit_names_the_number_to_change(
    weight_bytes: int, slot_bytes: int, slots: Any, says: str | None
) -> None:
    host = planned_host(1, weight_bytes, slot_bytes=slot_bytes)
    text = describe_devices([host], on_ray(slots=slots), find_gpu("a100-80gb"), None)
    assert ("fit;" in text or "not one" in text) == (says is not None)
    if says is not None:
        assert re.search(says, text)


def test_a_plan_does_not_ask_for_what_would_be_refused() -> None:
    whole = planned_host(1, 130 * GB)
    split = replace(whole, plan=build_topology(config_of({"model": "m", "tensor_parallel": 2})).hosts[0])
    quantised = replace(whole, weights={"gptq": 130 * GB})
    texts = [describe_devices([host], on_ray(), find_gpu("a100-80gb"), None) for host in (split, quantised)]
    assert not any("quantise" in text for text in texts)
    assert "split base over more ranks (tensor_parallel)" in texts[0]


def test_a_draft_model_that_does_not_fit_is_to_be_smaller() -> None:
    """It has no quantization and no resources to change."""
    config = config_of(
        "m",
        {"kind": {"kind": "prompted", "principle": "be kind"}},
        decoding={"draft": ["model"], "draft_model": "other"},
    )
    section = draft_section(config)
    assert section is not None
    held = {"bfloat16": 130 * GB}
    draft = replace(planned_host(None, 1), plan=draft_host(section), device_type="cpu", weights=held)
    base = replace(planned_host(None, GB), device_type="cpu")
    text = describe_devices([base, draft], config, None, 80 * GB)
    assert text.endswith("with 80 GB: choose a smaller decoding.draft_model, or more memory")


def test_a_plan_by_stated_sizes_says_that_it_does_not_count_the_draft_model(tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden_size": 96, "intermediate_size": 128, "heads": 6, "vocab_size": 100}
    for drafts in ({}, {"draft": ["model"], "draft_model": {"layers": 1}}):
        path = write_prompts(tmp_path / "prompts.jsonl", 2)
        config = config_of({"model": "no/such", "sizes": sizes}, decoding=drafts, input={"path": str(path)})
        findings = Findings({}, {"base": "it is not there"})
        text, _ = describe_stated(config, findings, plan_stated_hosts(config, findings, None), None)
        assert ("the draft model (decoding.draft_model) is not counted" in text) == bool(drafts)


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_first_layers_of_a_model_are_counted_beside_its_embedding_and_its_head(is_tied: bool) -> None:
    whole = LLAMA_65B.model_copy(update={"vocab_size": 250_000, "is_tied": is_tied})
    found = first_layers(size_as_stated(whole), 8)
    expected = count_stated(whole.model_copy(update={"layers": 8})).total
    assert sum(found.counts.values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stated", [True, False, None])
def test_a_head_shares_the_embeddings_weights_where_the_file_says_so(tiny: Tiny, tmp_path: Path, stated: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    tree = json.loads((folder / "config.json").read_text())
    tree.pop("tie_word_embeddings", None)
    tree |= {} if stated is None else {"tie_word_embeddings": stated}
    (folder / "config.json").write_text(json.dumps(tree))
    assert size_of_source(resolve_model(str(folder), cache_folder=NOWHERE)).is_tied == (stated is True)


def test_stated_sizes_that_ranks_cannot_divide_are_refused() -> None:
    sizes = {"layers": 2, "hidden_size": 96, "intermediate_size": 128, "heads": 6, "vocab_size": 100}
    config = config_of({"model": "no/such", "sizes": sizes, "tensor_parallel": 4})
    with pytest.raises(ConfigurationError, match=r"no/such \(for base\).*num_attention_heads, 6, cannot be divided"):
        plan_stated_hosts(config, Findings({}, {}), None)


def test_the_cost_counts_the_gpus_of_ranks_and_without_ray_those_that_hosts_share() -> None:
    host = planned_host(None, GB)
    split = replace(host, plan=build_topology(config_of({"model": "m", "tensor_parallel": 4})).hosts[0])
    local = config_of("m", cluster={"transport": "local"})
    assert count_gpus([split, planned_host(0.5, GB)], on_ray(replicas=2)) == 9
    assert count_gpus([split, host], local) == 4


def test_gpus_are_listed_with_the_sizes_in_their_names() -> None:
    for name, gpu in GPUS.items():
        assert gpu.memory_bytes == int(name.rpartition("-")[2].removesuffix("gb")) * GB
        assert 1e11 < gpu.bytes_per_s < 1e13
        assert gpu.flops > gpu.bytes_per_s
        assert gpu.source
    with pytest.raises(ConfigurationError, match=r"no GPU a100-8gb is known; did you mean a100-80gb\?"):
        find_gpu("a100-8gb")


def commit(shard: int, at: float, *, rows: int = 10, tokens: int = 1000, failed: int = 0) -> CommitRecord:
    return CommitRecord(shard, rows, failed, tokens, {}, 0, "", at, "")


def test_the_pace_is_that_of_the_tokens_between_commits() -> None:
    records = [commit(1, 30.0, tokens=600), commit(0, 10.0), commit(2, 50.0, tokens=1400, rows=9, failed=1)]
    pace = measure_pace(records)
    assert pace is not None
    assert (pace.tokens_per_second, pace.tokens_per_answer) == (2000 / 40, 3000 / 30)
    assert pace.seconds_for(20) == 20 * 100 / 50
    newest = measure_pace(records, newest=2)
    assert newest is not None
    assert newest.tokens_per_second == 1400 / 20
    assert measure_pace(records[:1]) is None
    assert measure_pace([commit(0, 1.0), commit(1, 1.0)]) is None


def test_a_run_is_priced_by_its_gpu_hours() -> None:
    hosts = [planned_host(1, 40 * GB), planned_host(0.5, 10 * GB, name="a")]
    throughput = Throughput(100.0, 50.0, "measured")
    lines = describe_cost(
        hosts, on_ray(replicas=2), 7200, 3600, gpu=find_gpu("a100-80gb"), throughput=throughput, price=2.0
    )
    # a step reads 40 GB at 2,039 GB/s; 7,200 answers of 50 tokens at 200 tokens/s take half an hour, on three GPUs
    assert re.search(rf"bound +{4 * 2039 / 40:,.0f} tokens/s", lines[0])
    assert "time      30 min 00 s: 7,200 answers of 50 tokens, 100.0 tokens/s a replica (measured)" in lines
    assert lines[-1] == "cost      1.50 GPU-hours on 3 GPUs; at 2 a GPU-hour 3.00, 0.83 for 1,000 rows"
    unknown = describe_cost(hosts, on_ray(), 1, 1, gpu=None, throughput=None, price=None)
    assert "not known before two shards are done" in unknown[0]
    limit = describe_cost(
        hosts, on_ray(), 10, 10, gpu=None, throughput=replace(throughput, tokens_per_answer=None), price=None
    )
    assert "10 answers of at most 256 tokens" in limit[0]


def test_another_runs_speed_needs_two_commits(tmp_path: Path) -> None:
    assert find_throughput(on_ray(), None, None) is None
    stated = find_throughput(on_ray(), None, 12.0)
    assert stated is not None
    assert (stated.tokens_per_second, stated.tokens_per_answer) == (12.0, None)
    with pytest.raises(ConfigurationError):
        find_throughput(on_ray(), str(tmp_path), None)


def test_the_headline_experiment_plans_without_its_weights() -> None:
    done = cage(
        "plan", "configs/weak_to_strong_65b.yaml", "--gpu", "a100-80gb", "--price", "2", "--throughput", "100"
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "base cannot be had here, so it is planned by its stated sizes: huggyllama/llama-65b" in out
    # 64.7B weights in 4.127 bits and 0.52B others in 16
    assert "34 GB (bnb-4bit 33 GB, bfloat16 1.1 GB)" in out
    assert re.search(r"a100-80gb 1 +80 GB +base +34 GB", out)
    assert re.search(r"slots: auto becomes [1-9]", out)
    assert re.search(r"cost +0\.3\d GPU-hours on 3 GPUs; at 2 a GPU-hour", out)
    too_small = cage("plan", "configs/weak_to_strong_65b.yaml", "base.quantization=null", "--gpu", "a100-80gb")
    assert "a100-80gb 1: not one slot fits: 131 GB of weights" in too_small.stdout
    unknown = cage("plan", "configs/weak_to_strong_65b.yaml", "base.sizes=null")
    assert unknown.returncode == 2
    assert "State base.sizes to plan without it" in unknown.stderr
