"""Specs of reward models: which of their outputs count, and whether they can read the run's prompts."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import ModelFacts
from pipeline.hub.tokenizer_facts import TokenizerFacts
from pipeline.protocol.specs import RewardSpec
from pipeline.protocol.topology import BASE, HostPlan, HostRole, Topology

CLASSIFIER = "ForSequenceClassification"


def specify_reward(
    plan: HostPlan,
    topology: Topology,
    config: Config,
    tokenizers: Mapping[str, TokenizerFacts],
    facts: ModelFacts,
) -> RewardSpec | None:
    """How the host of a reward model reads and scores; None for a language model's host.

    Args:
        plan: of the host.
        topology: of the run.
        config: of the run.
        tokenizers: by host name.
        facts: of the host's model.

    Raises:
        ConfigurationError: it is no sequence classifier, has other outputs, or does not say how it reads a prompt.
    """
    if not plan.is_reward_model:
        return None
    own = tokenizers[plan.name]
    architectures = facts.architectures
    if architectures and not any(CLASSIFIER in each for each in architectures):
        raise ConfigurationError(
            f"principals.{plan.name}.model: {plan.model.model} is a {', '.join(architectures)}; kind reward_model "
            f"needs a sequence classifier (...{CLASSIFIER})"
        )
    labels = tuple(_label(role, facts) for role in plan.roles)
    for role in plan.roles:
        _check_template(role.name, topology.roles[role.name].chat_template, config, tokenizers[BASE], own)
    return RewardSpec(labels)


def _label(role: HostRole, facts: ModelFacts) -> int:
    """The index of the output that counts."""
    label = None if role.scoring is None else role.scoring.label
    num_labels = facts.num_labels
    names = ", ".join(f"{index} ({text})" for index, text in sorted(facts.label_names.items()))
    if label is None and num_labels > 1:
        raise ConfigurationError(
            f"principals.{role.name}.label is missing: the model has {num_labels} outputs, {names}"
        )
    if (label or 0) >= num_labels:
        raise ConfigurationError(f"principals.{role.name}.label must be one of {names}; got {label}")
    return label or 0


def _check_template(
    name: str, template: str | None, config: Config, base: TokenizerFacts, own: TokenizerFacts
) -> None:
    """Refuse a reward model that would read conversations in another model's format."""
    is_chat = bool(config.base.chat_template or base.has_chat_template)
    if is_chat and not (own.has_chat_template or template):
        raise ConfigurationError(
            f"principals.{name}.template is missing: the reward model's tokenizer has no chat template"
        )
