"""From a configuration to everything that a replica needs, before any weights are loaded.

Models are found, tokenizers compared and contexts read here, so that what cannot work is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.sections import Config, Reproducibility
from pipeline.config.variants import Variant, lay_out
from pipeline.engine.prompts import ChatPrompter, Prompter
from pipeline.hub.descriptions import load_model_config
from pipeline.hub.sources import ModelSource, resolve_adapter, resolve_model
from pipeline.hub.tokenizers import (
    compare_tokenizers,
    context_length,
    load_tokenizer,
    stop_token_ids,
    text_config,
)
from pipeline.protocol.specs import GameSpec, HostSpec
from pipeline.protocol.topology import BASE, Topology
from pipeline.runtime.reward_specs import specify_reward
from pipeline.runtime.topology import adapters_of, build_topology, models_of


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a replica needs, without any weights. Picklable.

    Args:
        config: of the run.
        topology: roles and hosts.
        hosts: how to start each host, in the topology's order.
        identities: every model and adapter by content, by its dotted place in the configuration.
        prompter: encodes prompts and decodes answers.
        variants: the ways to answer a row.
    """

    config: Config
    topology: Topology
    hosts: tuple[HostSpec, ...]
    identities: Mapping[str, str]
    prompter: Prompter
    variants: tuple[Variant, ...]


def assemble(config: Config, cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None) -> Assembly:
    """Resolve models, compare tokenizers and lay out hosts.

    Raises:
        ConfigurationError: a model is missing or its tokenizer differs from the base's.
    """
    models = {
        place: resolve_model(
            model.model,
            revision=model.revision,
            cache_folder=cache_folder,
            trust_remote_code=model.trust_remote_code,
            progress=progress,
        )
        for place, model in models_of(config)
    }
    adapters = {
        place: resolve_adapter(path, cache_folder=cache_folder, progress=progress)
        for place, path in adapters_of(config)
    }
    source_of = {model.model_dump_json(): models[place] for place, model in models_of(config)}
    topology = build_topology(config, identify=lambda model: source_of[model.model_dump_json()].identity)
    sources = {plan.name: source_of[plan.model.model_dump_json()] for plan in topology.hosts}
    tokenizers = _load_tokenizers(topology, sources)
    model_configs = {name: load_model_config(source) for name, source in sources.items()}
    stop_ids = stop_token_ids(sources[BASE], tokenizers[BASE], model_configs[BASE])
    prompter = ChatPrompter(
        topology, tokenizers, {name: context_length(model) for name, model in model_configs.items()}, stop_ids
    )
    rewards = {
        plan.name: specify_reward(plan, topology, config, tokenizers, model_configs[plan.name], stop_ids)
        for plan in topology.hosts
    }
    sizes = [
        text_config(model_configs[name]).vocab_size
        for name, reward in rewards.items()
        if reward is None or reward.retokeniser is None
    ]
    vocab_size = min([len(tokenizers[BASE]), *sizes])
    adapter_of = {path: adapters[place] for place, path in adapters_of(config)}
    variants = lay_out(config)
    games = None
    if len(topology.hosts) == 1:
        rules = frozenset(variant.rule for variant in variants)
        games = GameSpec(config.decoding.sampling, topology.principals, rules)
    hosts = tuple(
        HostSpec(
            name=plan.name,
            serves=plan.serves,
            source=sources[plan.name],
            dtype=plan.model.dtype,
            device=plan.model.device,
            roles=plan.roles,
            num_slots=config.cluster.first_slots,
            vocab_size=vocab_size,
            strict=config.decoding.reproducibility is Reproducibility.STRICT,
            cache_folder=cache_folder,
            adapters={name: adapter_of[path] for name, path in plan.adapters.items()},
            reward=rewards[plan.name],
            games=games,
        )
        for plan in topology.hosts
    )
    identities = {place: model.identity for place, model in models.items()}
    identities |= {place: adapter.identity for place, adapter in adapters.items()}
    return Assembly(config, topology, hosts, identities, prompter, variants)


def _load_tokenizers(topology: Topology, sources: Mapping[str, ModelSource]) -> dict[str, Any]:
    """Every host's tokenizer, once each is known to hold the base's tokens; a reward model may have its own."""
    tokenizers = {plan.name: load_tokenizer(sources[plan.name]) for plan in topology.hosts}
    for plan in topology.hosts[1:]:
        if not plan.is_reward_model:
            compare_tokenizers(tokenizers[BASE], tokenizers[plan.name], BASE, f"{plan.name} ({plan.model.model})")
    return tokenizers
