"""What a replica will be made of: models found, hosts laid out and everything checked that their files say.

Nothing here imports torch or transformers: a plan is shown, and what cannot work is refused, within a second.
`pipeline.runtime.assembly` loads what a run needs besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import Config, Reproducibility
from pipeline.config.variants import Variant, lay_out
from pipeline.hub.model_facts import ModelFacts, read_model_facts
from pipeline.hub.sources import AdapterSource, ModelSource, resolve_adapter, resolve_model
from pipeline.hub.tokenizer_facts import TokenizerFacts, read_tokenizer_facts
from pipeline.hub.tokenizers import compare_tokenizers, share_tokens, stop_token_ids
from pipeline.protocol.specs import GameSpec, HostSpec
from pipeline.protocol.topology import BASE, HostPlan, Topology
from pipeline.runtime.reward_specs import specify_reward
from pipeline.runtime.topology import adapters_of, build_topology, models_of


@dataclass(frozen=True, slots=True)
class ResolvedModels:
    """The models and adapters of a configuration.

    Args:
        models: by their dotted places in the configuration.
        adapters: likewise.
    """

    models: Mapping[str, ModelSource]
    adapters: Mapping[str, AdapterSource]

    @property
    def identities(self) -> dict[str, str]:
        """Every model and adapter by content."""
        identities = {place: model.identity for place, model in self.models.items()}
        return identities | {place: adapter.identity for place, adapter in self.adapters.items()}


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """A replica before anything of it is loaded.

    Args:
        config: of the run.
        topology: roles and hosts.
        hosts: how to start each host, in the topology's order; reward models of `read_text` lack what reads the
            base's tokens for them.
        read_text: names of the hosts whose reward model has tokens of its own, and so reads answers as text.
        identities: every model and adapter by content, by its dotted place in the configuration.
        facts: of each host's model, by host name.
        tokenizers: of each host's tokenizer, by host name.
        stop_ids: token ids that end an answer.
        variants: the ways to answer a row.
    """

    config: Config
    topology: Topology
    hosts: tuple[HostSpec, ...]
    read_text: frozenset[str]
    identities: Mapping[str, str]
    facts: Mapping[str, ModelFacts]
    tokenizers: Mapping[str, TokenizerFacts]
    stop_ids: frozenset[int]
    variants: tuple[Variant, ...]


def resolve_models(
    config: Config, cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None
) -> ResolvedModels:
    """Find every model and adapter; configurations and tokenizers of models elsewhere are fetched.

    Args:
        config: of the run.
        cache_folder: where files are kept that are fetched.
        progress: called with a line for every file that is fetched or made.

    Raises:
        ConfigurationError: one is missing, or cannot be used.
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
    return ResolvedModels(models, adapters)


def plan_replica(config: Config, resolved: ResolvedModels, cache_folder: Path) -> ReplicaPlan:
    """Compare vocabularies and lay out hosts.

    Args:
        config: of the run.
        resolved: its models and adapters.
        cache_folder: where the hosts keep weights that they fetch.

    Raises:
        ConfigurationError: a tokenizer differs from the base's, or a model is not of the kind that it is used as.
    """
    source_of = {model.model_dump_json(): resolved.models[place] for place, model in models_of(config)}
    topology = build_topology(config, identify=lambda model: source_of[model.model_dump_json()].identity)
    sources = {plan.name: source_of[plan.model.model_dump_json()] for plan in topology.hosts}
    tokenizers = {name: read_tokenizer_facts(source) for name, source in sources.items()}
    read_text = frozenset(_hosts_that_read_text(topology, tokenizers))
    facts = {name: read_model_facts(source) for name, source in sources.items()}
    adapter_of = {path: resolved.adapters[place] for place, path in adapters_of(config)}
    vocab_size = min(
        [len(tokenizers[BASE].token_by_id), *(facts[name].vocab_size for name in facts if name not in read_text)]
    )
    variants = lay_out(config)

    def specify(plan: HostPlan) -> HostSpec:
        return HostSpec(
            name=plan.name,
            serves=plan.serves,
            source=sources[plan.name],
            dtype=plan.model.dtype,
            device=plan.model.device,
            attention=plan.model.attention,
            roles=plan.roles,
            num_slots=config.cluster.first_slots,
            vocab_size=vocab_size,
            strict=config.decoding.reproducibility is Reproducibility.STRICT,
            cache_folder=cache_folder,
            adapters={name: adapter_of[path] for name, path in plan.adapters.items()},
            reward=specify_reward(plan, topology, config, tokenizers, facts[plan.name]),
            games=_games(config, topology, variants),
        )

    return ReplicaPlan(
        config=config,
        topology=topology,
        hosts=tuple(map(specify, topology.hosts)),
        read_text=read_text,
        identities=resolved.identities,
        facts=facts,
        tokenizers=tokenizers,
        stop_ids=stop_token_ids(sources[BASE], tokenizers[BASE], facts[BASE]),
        variants=variants,
    )


def _hosts_that_read_text(topology: Topology, tokenizers: Mapping[str, TokenizerFacts]) -> list[str]:
    """Hosts with tokens of their own, which only a reward model's may be. Raises ConfigurationError."""
    found = []
    for plan in topology.hosts[1:]:
        if not plan.is_reward_model:
            compare_tokenizers(tokenizers[BASE], tokenizers[plan.name], BASE, f"{plan.name} ({plan.model.model})")
        elif not share_tokens(tokenizers[BASE], tokenizers[plan.name]):
            found.append(plan.name)
    return found


def _games(config: Config, topology: Topology, variants: tuple[Variant, ...]) -> GameSpec | None:
    """What a lone host needs to sample; None where several hosts work together."""
    if len(topology.hosts) > 1:
        return None
    rules = frozenset(variant.rule for variant in variants)
    return GameSpec(config.decoding.sampling, topology.principals, rules)
