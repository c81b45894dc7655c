"""`cage plan`: what `relabel` would run, without loading any weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.job_files import load_job
from jobs.commands.plan_cost import Throughput, describe_cost, find_throughput
from jobs.commands.plan_memory import describe_devices, placement, plan_hosts
from jobs.commands.plan_prompts import describe_prompts
from jobs.commands.plan_run import describe_existing
from jobs.commands.plan_stated import describe_stated, find_what_is_here, plan_stated_hosts
from jobs.commands.text import printable, table
from pipeline.config.sections import Config, ReplicaRange, Transport
from pipeline.config.variants import lay_out, names_of
from pipeline.errors import ConfigurationError
from pipeline.hub.descriptions import describe_model
from pipeline.hub.embedded import default_cache_folder
from pipeline.hub.families import PLAIN, ROW_BY_ROW
from pipeline.hub.generation_settings import unobeyed_settings
from pipeline.hub.gpus import Gpu
from pipeline.hub.tokenizers import listed_tokens
from pipeline.principals.section import TUNED
from pipeline.protocol.memory import available_bytes
from pipeline.protocol.messages import most_drafted
from pipeline.protocol.specs import HostSpec
from pipeline.protocol.topology import PrincipalPlan, Scoring
from pipeline.runtime.memory_plan import PlannedHost
from pipeline.runtime.replica_plan import ReplicaPlan, plan_replica
from pipeline.stages.relabel import prepare
from pipeline.storage.plan import Plan
from pipeline.training.settings import TrainConfig


@dataclass(frozen=True, slots=True)
class Machines:
    """What a run is planned for.

    Args:
        gpu: the kind of GPU that hosts are planned on; None: it is not known.
        price: of one GPU for an hour.
        like: folder of a run whose speed is taken.
        throughput: tokens a second of one replica.
    """

    gpu: Gpu | None = None
    price: float | None = None
    like: str | None = None
    throughput: float | None = None


ANY_MACHINES = Machines()


def run_plan(config_file: Path, overrides: list[str], machines: Machines = ANY_MACHINES) -> None:
    config = load_job(config_file, overrides)
    cache_folder = default_cache_folder(os.environ)
    if isinstance(config, TrainConfig):
        if machines != ANY_MACHINES:
            raise ConfigurationError(
                "--gpu, --price, --like and --throughput are for plans of answers, not of training"
            )
        print(describe_training(config, cache_folder))
        return
    throughput = find_throughput(config, machines.like, machines.throughput)
    if (findings := find_what_is_here(config, cache_folder)) is not None:
        hosts = plan_stated_hosts(config, findings, machines.gpu)
        text, num_rows = describe_stated(config, findings, hosts, machines.gpu)
        print(text)
        num_answers = num_rows * len(lay_out(config)) * config.decoding.n
        print(_cost(hosts, config, machines, throughput, num_answers, num_rows))
        return
    prepared = prepare(config, cache_folder)
    replica = plan_replica(config, prepared.models, cache_folder)
    hosts = plan_hosts(replica, machines.gpu)
    notes = (prepared.columns, *prepared.notes)
    print(describe_plan(prepared.plan, replica, notes, hosts=hosts, gpu=machines.gpu))
    print(_cost(hosts, config, machines, throughput, prepared.plan.num_answers, prepared.plan.num_rows))
    print(describe_prompts(prepared.plan, replica))


def _cost(
    hosts: Sequence[PlannedHost],
    config: Config,
    machines: Machines,
    throughput: Throughput | None,
    num_answers: int,
    num_rows: int,
) -> str:
    return "\n".join(
        describe_cost(
            hosts, config, num_answers, num_rows, gpu=machines.gpu, throughput=throughput, price=machines.price
        )
    )


def _machine_bytes(config: Config) -> int | None:
    """What can be allocated on this machine, where hosts on CPUs are on it."""
    if config.cluster.transport is Transport.RAY and config.cluster.address is not None:
        return None
    return available_bytes()


def describe_training(config: TrainConfig, cache_folder: Path) -> str:
    """The pairs of each objective and what was left out, the backbone, and the steps of each training."""
    from pipeline.training.backbone import find_backbone  # imports torch: seconds
    from pipeline.training.data import open_preferences, read_data

    found = open_preferences(config.input)
    backbone = find_backbone(config, cache_folder)
    data = read_data(found, config, backbone.encode, cache_folder)
    training = config.training
    lines = [
        f"input     {printable(config.input.path)}: {found.records.num_rows:,} rows, shape {found.layout.shape}"
        + (f", system messages of the column {printable(found.layout.system)}" if found.layout.system else ""),
        *(f"          {printable(line)}" for line in (*data.drops.describe(), *data.notes)),
        f"output    {printable(config.output.path)}",
        f"base      {printable(config.base.model)}, on {backbone.device}",
        f"loss      {training.loss}, beta {training.effective_beta:g}, rank {training.rank}",
        "",
    ]
    rows = []
    for name in data.objectives:
        train, held_out = data.of(name)
        tokens = sum(2 * len(pair.prompt_ids) + sum(map(len, pair.answer_ids)) for pair in train)
        steps = math.ceil(math.ceil(len(train) / training.batch_size) * training.epochs)
        rows.append([name, f"{len(train):,}", f"{len(held_out):,}", f"{tokens:,}", f"{steps:,}"])
    return "\n".join([*lines, table(["objective", "pairs", "held out", "tokens an epoch", "steps"], rows)])


def describe_plan(
    plan: Plan,
    replica: ReplicaPlan,
    notes: Sequence[str] = (),
    *,
    hosts: Sequence[PlannedHost] | None = None,
    gpu: Gpu | None = None,
) -> str:
    """Rows and shards, principals and their roles, hosts and their placement, and what one replica takes.

    `notes` on the input are shown below it.
    """
    config = replica.config
    hosts = plan_hosts(replica, gpu) if hosts is None else hosts
    decoding, cluster = config.decoding, config.cluster
    files, answers = len(plan.files), len(plan.variants) * plan.num_samples
    lines = [
        f"input     {printable(config.input.path)}: {plan.num_rows:,} rows in {files:,} file{'s' * (files != 1)}",
        *(f"          {note}" for note in notes),
        f"output    {printable(config.output.path)}: {len(plan.shards):,} shard{'s' * (len(plan.shards) != 1)} "
        f"of at most {plan.rows_per_shard:,} rows" + (f", {answers:,} answers per row" if answers > 1 else ""),
        _rule(config)
        + (f"top {decoding.candidates} of the base" if decoding.candidates != "all" else "full vocabulary")
        + f", at most {decoding.max_new_tokens:,} tokens per row, {decoding.reproducibility} reproducibility",
        *_agent_temperature(config),
        "",
        _principals(config, replica),
        *_on_text(replica),
        "",
        _hosts(replica),
        *_decoding(replica),
        *_drafts(replica, hosts),
        *_splits(replica),
        *_masked(replica),
        *_unobeyed(replica),
        *(f"warning   {printable(line)}" for line in replica.foreign_adapters),
        "",
        placement(hosts, config),
        "",
        describe_devices(hosts, config, gpu, _machine_bytes(config)),
        f"cluster   {_where(config)}: {_replicas(cluster.replica_range)} "
        + ("with as many slots as memory holds" if cluster.slots == "auto" else f"with {cluster.slots} slots")
        + " each" * (cluster.replica_range.max != 1),
        f"digest    {plan.digest[:16]}, of everything that changes answers",
        *describe_existing(config.output.path, plan),
    ]
    return "\n".join(lines)


def _rule(config: Config) -> str:
    """What decides: one rule, or the grid of variants."""
    variants = lay_out(config)
    if len(variants) == 1:
        return f"rule      {variants[0].rule}, agent temperature {variants[0].agent_temperature:g}, "
    rules = dict.fromkeys(names_of(variants))
    temperatures = dict.fromkeys(f"{variant.agent_temperature:g}" for variant in variants)
    vectors = {repr(variant.weights) for variant in variants}
    return (
        f"grid      {len(variants):,} variants of rules {', '.join(rules)}, agent temperatures "
        f"{', '.join(temperatures)} and {len(vectors):,} weight vector{'s' * (len(vectors) != 1)}; "
    )


def _agent_temperature(config: Config) -> list[str]:
    """What the agent temperature means, where one is used."""
    variants = [variant for variant in lay_out(config) if variant.rule.uses_temperature]
    if not variants or not config.principals:
        return []
    found = list(dict.fromkeys(f"{variant.agent_temperature:g}" for variant in variants))
    is_default = not config.grid.agent_temperatures and "agent_temperature" not in config.decoding.model_fields_set
    costs = f"{' or '.join(found)} nats of weighted reward"
    return [
        f"          agent temperature: one nat of KL to the base costs the agent {costs}"
        + (" (the default; lower steers more)" if is_default else "; lower steers more")
    ]


def _replicas(count: ReplicaRange) -> str:
    most = f"{count.max} replica{'s' * (count.max != 1)}"
    return most if count.min == count.max else f"{count.min} to {most}"


def _where(config: Config) -> str:
    if config.cluster.transport is Transport.LOCAL:
        return "this process, no Ray"
    return config.cluster.address or "a local Ray cluster"


def _principals(config: Config, replica: ReplicaPlan) -> str:
    scorings = {role.name: role.scoring for plan in replica.topology.hosts for role in plan.roles}
    rows = [
        [each.name, each.kind, f"{each.weight:g}", _reward(each, scorings[each.roles[TUNED]] if each.roles else None)]
        for each in replica.topology.principals
    ]
    return table(["principal", "kind", "weight", "token reward q"], rows) if rows else "no principals: the base alone"


def _reward(principal: PrincipalPlan, scoring: Scoring | None) -> str:
    """How a principal's q comes about."""
    if scoring is not None:
        return _score(scoring)
    return principal.section.describe(principal.roles)


def _score(scoring: Scoring) -> str:
    gain = "RM(prefix + a) - RM(prefix)"
    scaled = gain if scoring.factor == 1 else f"{scoring.factor:g} ({gain})"
    pace = "token" if scoring.interval == 1 else f"{scoring.interval} tokens"
    end = ", each as if the answer ended there" if scoring.ends else ""
    return f"{scaled}, top {scoring.candidates}, every {pace}{end}"


def _on_text(replica: ReplicaPlan) -> list[str]:
    """A line for each model whose tokens are not the base's: that it reads text, and what that costs."""
    lines = []
    for plan in replica.topology.hosts:
        if plan.name not in replica.read_text:
            continue
        scored = [role.scoring.candidates for role in plan.roles if role.scoring]
        candidates = max(scored) if scored else replica.config.decoding.candidates
        assert candidates != "all"
        each = "scored step" if scored else "step"
        lines.append(
            f"{', '.join(plan.serves)} is scored on text, its tokens are not the base's: "
            f"{(1 + candidates) * max(1, len(plan.roles) - len(scored)):,} texts per row and {each} "
            "are tokenized again, and branches may have several tokens"
        )
    return lines


def _hosts(replica: ReplicaPlan) -> str:
    rows = [
        [
            plan.name,
            printable(plan.model.model),
            _millions(describe_model(spec.source).num_parameters),
            ", ".join(role.name + (f" ({role.adapter})" if role.adapter else "") for role in plan.roles),
        ]
        for plan, spec in zip(replica.topology.hosts, replica.hosts, strict=True)
    ]
    return table(["host", "model", "parameters", "roles (one forward pass per step)"], rows)


def _millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:,.0f} M" if millions >= 10 else f"{millions:.1f} M"


def _decoding(replica: ReplicaPlan) -> list[str]:
    """Lines for each language model that is not known to be decoded in slots, or that could see or hear."""
    lines = []
    for name, expected in replica.expected.items():
        if expected.decoding == PLAIN:
            reason = f": {expected.reason}" if expected.reason else ", as the configuration says"
            lines.append(f"{name} is decoded one row at a time, {ROW_BY_ROW} (docs/performance.md){reason}")
        elif expected.decoding is None:
            model_type = replica.facts[name].model_type
            lines.append(f"{name}: `cage models` does not know {model_type}; it is checked when it is loaded")
        if expected.left_out:
            lines.append(
                f"{name} reads and writes text alone: {', '.join(expected.left_out)} of its model is left out"
            )
    return lines


def _drafts(replica: ReplicaPlan, hosts: Sequence[PlannedHost]) -> list[str]:
    """A line that says where proposed tokens come from, or why there are none."""
    decoding = replica.config.decoding
    is_set = "draft" in decoding.model_fields_set
    if decoding.draft == "off" or (replica.undrafted and not is_set):
        return []
    if replica.undrafted:
        return [f"drafts    none: {'; '.join(replica.undrafted)}"]
    names = {plan.name for plan in replica.topology.hosts}
    if not decoding.asks_for_drafts and any(each.device_type == "cuda" for each in hosts if each.plan.name in names):
        return ["drafts    none: auto has them on CPUs; name sources to have them on GPUs"] if is_set else []
    absent = {"response": not replica.config.has_existing, "siblings": not replica.config.has_siblings}
    sources: list[str] = [each for each in replica.config.draft_sources if not absent.get(each, False)]
    if replica.draft is not None:
        sources[sources.index("model")] = f"model ({_of_model(replica.draft)})"
    after = " after its reasoning" if replica.reasoning is not None else ""
    return [
        f"drafts    {', '.join(sources)}: a pass verifies several tokens of an answer{after} where that takes less "
        f"time{_room_for_drafts(replica, hosts)}"
    ]


def _room_for_drafts(replica: ReplicaPlan, hosts: Sequence[PlannedHost]) -> str:
    """What passes on GPUs have room for, where the number of slots is known."""
    slots, names = replica.config.cluster.slots, {plan.name for plan in replica.topology.hosts}
    rows = [len(host.plan.roles) for host in hosts if host.device_type == "cuda" and host.plan.name in names]
    if slots == "auto" or not rows:
        return ""
    count = min(most_drafted(slots, each) for each in rows)
    return f"; a full batch of {slots} slots has room for {count} on a GPU, each slot without a row for one more"


def _of_model(draft: HostSpec) -> str:
    if draft.layers is None:
        return draft.source.name
    return f"the first {'layer' if draft.layers == 1 else f'{draft.layers} layers'} of {draft.source.name}"


def _splits(replica: ReplicaPlan) -> list[str]:
    """A line for each host whose weights are on several devices, with what that needs of the machines."""
    where = (
        " and a GPU of its own where there are GPUs"
        if replica.config.cluster.transport is Transport.LOCAL
        else "; on one machine where one has what all of them reserve, else on several, and every layer waits for "
        "the network"
    )
    return [
        f"{plan.name} is split over {plan.model.tensor_parallel} processes, each with its part of every layer{where}"
        for plan in replica.topology.hosts
        if plan.model.tensor_parallel > 1
    ] + [
        f"the layers of {plan.name} are spread over {plan.model.pipeline_parallel} GPUs of one process, which "
        "compute one after another, without CUDA graphs and compiled layers, and do not run ahead"
        for plan in replica.topology.hosts
        if plan.model.pipeline_parallel > 1
    ]


def _masked(replica: ReplicaPlan) -> list[str]:
    """A line for each model whose tokens are not all the base's: which ones answers do without."""
    return [
        f"{name} and base share all tokens but {listed_tokens(sorted(tokens), tokens)}; no answer has these"
        for name, tokens in replica.masked.items()
    ]


def _unobeyed(replica: ReplicaPlan) -> list[str]:
    """A line with settings of the base's own that would change what it draws, where it has some."""
    stated = unobeyed_settings(replica.hosts[0].source)
    if not stated:
        return []
    shown = [
        f"{key} ({len(value)} values)" if isinstance(value, list | dict) else f"{key} {json.dumps(value)}"
        for key, value in stated.items()
    ]
    return [
        f"generation_config.json of base says {', '.join(shown)}; that is not obeyed, decoding says how tokens are "
        "drawn"
    ]
