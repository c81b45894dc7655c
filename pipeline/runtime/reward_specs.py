"""Specs of models that score branches: which outputs count, and whether they can read the run's prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import ModelFacts
from pipeline.hub.reward_heads import CLASSIFIER, choose_output, find_value_head, hidden_size, read_head
from pipeline.hub.sources import AdapterSource, Location, ModelSource
from pipeline.hub.tokenizer_facts import TokenizerFacts
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json
from pipeline.protocol.specs import RewardSpec, TextSpec
from pipeline.protocol.topology import BASE, HostPlan, HostRole, Topology


def specify_reward(
    plan: HostPlan,
    topology: Topology,
    config: Config,
    tokenizers: Mapping[str, TokenizerFacts],
    facts: ModelFacts,
    source: ModelSource,
    adapters: Mapping[str, AdapterSource],
) -> RewardSpec | None:
    """How the host of a reward model reads and scores; None for a language model's host.

    Args:
        plan: of the host.
        topology: of the run.
        config: of the run.
        tokenizers: by host name.
        facts: of the host's model.
        source: of the host's model.
        adapters: of the host, by the names that roles use.

    Raises:
        ConfigurationError: it has no head, one that does not fit, or other outputs, or does not say how it reads a
            prompt.
    """
    if not plan.is_reward_model:
        return None
    labels = tuple(_label(role, plan, facts, source, adapters) for role in plan.roles)
    _check_templates(plan, topology, config, tokenizers)
    return RewardSpec(labels, tuple(role.scoring.ends if role.scoring else None for role in plan.roles))


def specify_text(
    plan: HostPlan, topology: Topology, config: Config, tokenizers: Mapping[str, TokenizerFacts]
) -> TextSpec | None:
    """How the host of a language model with other tokens reads answers; None for any other host.

    Raises:
        ConfigurationError: it does not say how it reads a prompt, or candidates are the whole vocabulary.
    """
    if not plan.reads_text or plan.is_reward_model:
        return None
    _check_templates(plan, topology, config, tokenizers)
    if config.decoding.candidates == "all":
        raise ConfigurationError(
            f"decoding.candidates: all needs models with the base's tokens, and {plan.model.model} (for "
            f"{', '.join(plan.serves)}) has others: it reads every candidate as text. Give a number"
        )
    return TextSpec(num_candidates=config.decoding.candidates)


def _label(
    role: HostRole,
    plan: HostPlan,
    facts: ModelFacts,
    source: ModelSource,
    adapters: Mapping[str, AdapterSource],
) -> int | str | None:
    """The number of the output that counts; as configured where the weights, which say that, are not here."""
    label = None if role.scoring is None else role.scoring.label
    place = f"principals.{role.name}"
    if role.adapter is not None:
        adapter = adapters[role.adapter]
        width = hidden_size(read_json(LocalTree(Path(source.path)), CONFIG))
        head = find_value_head(Path(adapter.path), f"{place}.adapter: {adapter.name}", width=width)
        if head is None:
            raise ConfigurationError(f"{place}.adapter: {adapter.name} has no value_head.safetensors in its folder")
        return choose_output(label, head.names, place)
    head = read_head(source)
    is_classifier = not facts.architectures or any(CLASSIFIER in each for each in facts.architectures)
    if head is not None and not (is_classifier and head.weights == {"score.weight"}):
        return choose_output(label, head.names, place)
    if is_classifier:
        return choose_output(label, [facts.label_names[at] for at in sorted(facts.label_names)], place)
    if source.location in (Location.HUB, Location.REMOTE):
        return label  # its weights are not here yet
    raise ConfigurationError(
        f"{place}.model: {plan.model.model} is a {', '.join(facts.architectures)} whose files hold no head that "
        f"gives scores; it needs a sequence classifier (...{CLASSIFIER}), a reward model or a value head"
    )


def _check_templates(
    plan: HostPlan, topology: Topology, config: Config, tokenizers: Mapping[str, TokenizerFacts]
) -> None:
    for role in plan.roles:
        _check_template(
            role.name, topology.roles[role.name].chat_template, config, tokenizers[BASE], tokenizers[plan.name]
        )


def _check_template(
    name: str, template: str | None, config: Config, base: TokenizerFacts, own: TokenizerFacts
) -> None:
    """Refuse a model that would read conversations in another model's format."""
    is_chat = bool(config.base.chat_template or base.has_chat_template)
    if is_chat and not (own.has_chat_template or template):
        raise ConfigurationError(
            f"principals.{name.partition('.')[0]}.template is missing: its model's tokenizer has no chat template"
        )
