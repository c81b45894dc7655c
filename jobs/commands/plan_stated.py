"""`cage plan` of models that cannot be had here: memory, time and cost from their stated sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.plan_memory import describe_devices, placement
from jobs.commands.text import printable
from pipeline.config.sections import Config
from pipeline.config.variants import lay_out
from pipeline.errors import ConfigurationError
from pipeline.hub.gpus import Gpu
from pipeline.hub.parallel_plans import why_not_divided, why_too_few_layers
from pipeline.hub.sources import ModelSource, resolve_configured
from pipeline.protocol.topology import HostPlan
from pipeline.runtime.drafts import PLACE, draft_section
from pipeline.runtime.memory_plan import PlannedHost, device_type_of, plan_host, size_as_stated, size_of_source
from pipeline.runtime.splits import check_split
from pipeline.runtime.topology import build_topology, models_of
from pipeline.sections import ModelSizes
from pipeline.storage.plan import open_planned_input


@dataclass(frozen=True, slots=True)
class Findings:
    """Which models of a configuration are here.

    Args:
        sources: those that are, by their section as JSON.
        missing: why others are not, by their dotted place.
    """

    sources: Mapping[str, ModelSource]
    missing: Mapping[str, str]


def find_what_is_here(config: Config, cache_folder: Path) -> Findings | None:
    """Look for the models of a configuration that states the sizes of some; None where all of them are here.

    Raises:
        ConfigurationError: one is missing that states no sizes, while another is planned by its.
    """
    models = list(models_of(config))
    if all(model.sizes is None for _, model in models):
        return None
    sources: dict[str, ModelSource] = {}
    missing: dict[str, str] = {}
    unstated: dict[str, str] = {}
    for place, model in models:
        try:
            sources[model.model_dump_json()] = resolve_configured(model, cache_folder)
        except ConfigurationError as error:
            (missing if model.sizes is not None else unstated)[place] = str(error)
    if missing and unstated:
        place, reason = next(iter(unstated.items()))
        raise ConfigurationError(f"{place}: {reason}. State {place}.sizes to plan without it")
    return Findings(sources, missing) if missing else None


def plan_stated_hosts(config: Config, findings: Findings, gpu: Gpu | None) -> list[PlannedHost]:
    """What each host of a replica takes; models that are here by their own configuration.

    Raises:
        ConfigurationError: a model cannot be split over its ranks.
    """
    hosts = []
    for plan in build_topology(config).hosts:
        source = findings.sources.get(plan.model.model_dump_json())
        if source is not None:
            check_split(plan, source)
            sized = size_of_source(source)
        else:
            assert plan.model.sizes is not None
            _check_sizes(plan, plan.model.sizes)
            sized = size_as_stated(plan.model.sizes)
        hosts.append(plan_host(plan, sized, config, device_type=device_type_of(plan.model, gpu), source=source))
    return hosts


def _check_sizes(plan: HostPlan, sizes: ModelSizes) -> None:
    """Refuse a model whose stated sizes cannot be divided by the number of its ranks, or whose layers are too few."""
    stated = {
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads or sizes.heads,
        "intermediate_size": sizes.intermediate_size,
    }
    if reason := why_not_divided(stated, plan.model.tensor_parallel):
        raise ConfigurationError(
            f"{plan.model.model} (for {', '.join(plan.serves)}) cannot be split over {plan.model.tensor_parallel} "
            f"ranks: {reason}"
        )
    if reason := why_too_few_layers(sizes.layers, plan.model.pipeline_parallel):
        raise ConfigurationError(
            f"{plan.model.model} (for {', '.join(plan.serves)}) cannot be spread over {plan.model.pipeline_parallel} "
            f"devices: {reason}"
        )


def describe_stated(config: Config, findings: Findings, hosts: list[PlannedHost], gpu: Gpu | None) -> tuple[str, int]:
    """The plan as far as it can be made, and the rows of the input."""
    num_rows = open_planned_input(config).num_rows
    answers = len(lay_out(config)) * config.decoding.n
    lines = [
        f"input     {printable(config.input.path)}: {num_rows:,} rows"
        + (f", {answers:,} answers per row" if answers > 1 else ""),
        f"output    {printable(config.output.path)}",
        "",
        *(
            f"{place} cannot be had here, so it is planned by its stated sizes: {printable(reason)}"
            for place, reason in findings.missing.items()
        ),
        "a run needs these models; tokens, chat templates and adapters are not checked in this plan",
        *([f"the draft model ({PLACE}) is not counted"] if draft_section(config) is not None else []),
        "",
        placement(hosts, config),
        "",
        describe_devices(hosts, config, gpu, None),
    ]
    return "\n".join(lines), num_rows
