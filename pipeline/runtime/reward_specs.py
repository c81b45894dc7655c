"""How a run's reward models are read: which of their outputs count, and in whose tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.sections import Config, RewardModelPrincipal
from pipeline.errors import ConfigurationError
from pipeline.hub.retokeniser import Retokeniser
from pipeline.hub.tokenizers import compare_tokenizers
from pipeline.protocol.messages import RewardSpec
from pipeline.runtime.topology import BASE, HostPlan

CLASSIFIER = "ForSequenceClassification"


def specify_reward(
    plan: HostPlan, config: Config, tokenizers: Mapping[str, Any], model_config: Any, stop_ids: frozenset[int]
) -> RewardSpec | None:
    """How the host of a reward model reads and scores; None for a language model's host.

    Raises:
        ConfigurationError: it is no sequence classifier, has other outputs, or does not say how it reads a prompt.
    """
    if not plan.scorings:
        return None
    own = tokenizers[plan.name]
    architectures = getattr(model_config, "architectures", None) or []
    if architectures and not any(CLASSIFIER in each for each in architectures):
        raise ConfigurationError(
            f"principals.{plan.name}.model: {plan.model.model} is a {', '.join(architectures)}; kind reward_model "
            f"needs a sequence classifier (...{CLASSIFIER})"
        )
    labels = tuple(_label(role.name, config, model_config) for role in plan.roles)
    for role in plan.roles:
        _check_template(role.name, config, tokenizers[BASE], own)
    shared = shares_tokens(tokenizers[BASE], own)
    return RewardSpec(labels, None if shared else Retokeniser(tokenizers[BASE], own, stop_ids))


def shares_tokens(base: Any, other: Any) -> bool:
    """Whether two tokenizers give every id the same token."""
    try:
        compare_tokenizers(base, other, BASE, "other")
    except ConfigurationError:
        return False
    return True


def _label(name: str, config: Config, model_config: Any) -> int:
    """The index of the output that counts."""
    label = _principal(name, config).label
    num_labels = int(model_config.num_labels)
    names = ", ".join(f"{index} ({text})" for index, text in sorted(model_config.id2label.items()))
    if label is None and num_labels > 1:
        raise ConfigurationError(f"principals.{name}.label is missing: the model has {num_labels} outputs, {names}")
    if (label or 0) >= num_labels:
        raise ConfigurationError(f"principals.{name}.label must be one of {names}; got {label}")
    return label or 0


def _check_template(name: str, config: Config, base: Any, own: Any) -> None:
    """Refuse a reward model that would read conversations in another model's format."""
    is_chat = bool(config.base.chat_template or base.chat_template)
    if is_chat and not (own.chat_template or _principal(name, config).template):
        raise ConfigurationError(
            f"principals.{name}.template is missing: the reward model's tokenizer has no chat template"
        )


def _principal(name: str, config: Config) -> RewardModelPrincipal:
    principal = config.principals[name]
    assert isinstance(principal, RewardModelPrincipal)
    return principal
