"""Who plays: principals become roles, roles that share weights share a host.

A role is one distribution needed at every step. Two principals that need the same distribution share one role; two
roles of the same weights share one host and one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.config.sections import (
    ArmPrincipal,
    Config,
    ModelConfig,
    Principal,
    PromptedPrincipal,
    RewardModelPrincipal,
)
from pipeline.protocol.messages import HostRole

BASE = "base"


@dataclass(frozen=True, slots=True)
class Role:
    """One distribution: which host serves it, with which adapter, and what its prompt looks like."""

    name: str
    host: str
    adapter: str | None
    chat_template: str | None
    principle: str | None


@dataclass(frozen=True, slots=True)
class Scoring:
    """When a reward model scores for a principal, how many candidates, and nats by point of its score."""

    candidates: int
    interval: int
    factor: float


@dataclass(frozen=True, slots=True)
class PrincipalPlan:
    """A principal's token reward: q = log p of role `tuned`, minus log p of role `reference` where there is one.

    Of a reward model, role `tuned` gives q itself.
    """

    name: str
    weight: float
    tuned: str
    reference: str | None


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One set of weights, its adapters (name to folder) and the roles and principals that it serves.

    `scorings` has one entry a role where the model is a sequence reward model, and none where it is a language model.
    """

    name: str
    model: ModelConfig
    roles: tuple[HostRole, ...]
    adapters: Mapping[str, str]
    serves: tuple[str, ...]
    scorings: tuple[Scoring, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts, roles and principals of one run; the first host is the base's and its first role the base."""

    hosts: tuple[HostPlan, ...]
    roles: Mapping[str, Role]
    principals: tuple[PrincipalPlan, ...]

    @property
    def weights(self) -> dict[str, float]:
        return {principal.name: principal.weight for principal in self.principals}


def build_topology(config: Config, identify: Callable[[ModelConfig], str] = lambda model: model.model) -> Topology:
    """Lay out roles and hosts. `identify` names a model's weights: equal names share a host."""
    builder = _Builder(config, identify)
    base_host = builder.host(config.base, BASE)
    builder.role(BASE, base_host, None, config.base.chat_template, None)
    principals = tuple(builder.principal(name, principal) for name, principal in config.principals.items())
    hosts = tuple(
        HostPlan(
            draft.name,
            draft.model,
            tuple(HostRole(role.name, role.adapter) for role in builder.roles.values() if role.host == draft.name),
            dict(draft.adapters),
            tuple(dict.fromkeys(draft.serves)),
            tuple(draft.scorings),
        )
        for draft in builder.hosts.values()
    )
    return Topology(hosts, {role.name: role for role in builder.roles.values()}, principals)


def models_of(config: Config) -> Iterator[tuple[str, ModelConfig]]:
    """Every model that the configuration names, with its dotted place."""
    yield BASE, config.base
    for name, principal in config.principals.items():
        if principal.model is not None:
            yield f"principals.{name}.model", principal.model
        reference = getattr(principal, "reference", None)
        if isinstance(reference, ModelConfig):
            yield f"principals.{name}.reference", reference


def adapters_of(config: Config) -> Iterator[tuple[str, str]]:
    """Every adapter folder that the configuration names, with its dotted place."""
    for name, principal in config.principals.items():
        if isinstance(principal, ArmPrincipal) and principal.adapter is not None:
            yield f"principals.{name}.adapter", principal.adapter


@dataclass(slots=True)
class _HostDraft:
    name: str
    model: ModelConfig
    adapters: dict[str, str] = field(default_factory=dict)
    serves: list[str] = field(default_factory=list)
    scorings: list[Scoring] = field(default_factory=list)


class _Builder:
    def __init__(self, config: Config, identify: Callable[[ModelConfig], str]) -> None:
        self.config = config
        self.identify = identify
        self.hosts: dict[tuple[str, str, str, bool, bool], _HostDraft] = {}
        self.roles: dict[tuple[str, str | None, str | None, str | None], Role] = {}

    def host(self, model: ModelConfig, serves: str, *, scores: bool = False) -> _HostDraft:
        key = (self.identify(model), model.dtype, model.device, model.trust_remote_code, scores)
        draft = self.hosts.get(key)
        if draft is None:
            draft = self.hosts[key] = _HostDraft(serves, model)
        draft.serves.append(serves.partition(".")[0])
        return draft

    def role(
        self, name: str, host: _HostDraft, adapter: str | None, template: str | None, principle: str | None
    ) -> str:
        key = (host.name, adapter, template, principle)
        if key not in self.roles:
            self.roles[key] = Role(name, host.name, adapter, template, principle)
        return self.roles[key].name

    def reward_model(self, name: str, principal: RewardModelPrincipal) -> PrincipalPlan:
        """A role of its own, whose rows share the passes of other roles on the same weights."""
        host = self.host(principal.model, name, scores=True)
        host.scorings.append(Scoring(principal.candidates, principal.interval, principal.sign * principal.scale))
        # it reads prompts by its own tokenizer's template
        self.roles[host.name, name, None, None] = Role(name, host.name, None, principal.template, None)
        return PrincipalPlan(name, principal.weight, name, None)

    def principal(self, name: str, principal: Principal) -> PrincipalPlan:
        if isinstance(principal, RewardModelPrincipal):
            return self.reward_model(name, principal)
        model = principal.model or self.config.base
        host = self.host(model, name)
        template = principal.template or self.config.base.chat_template
        if isinstance(principal, PromptedPrincipal):
            tuned = self.role(name, host, None, template, principal.principle)
            # the reference answers the plain prompt: the base itself where the weights and the template agree
            reference = self.role(f"{name}.reference", host, None, template, None)
            return PrincipalPlan(name, principal.weight, tuned, reference)
        adapter = self._adapter(principal, host)
        tuned = self.role(name, host, adapter, template, None)
        return PrincipalPlan(name, principal.weight, tuned, self._reference(name, principal, host, template))

    def _adapter(self, principal: Principal, host: _HostDraft) -> str | None:
        if not isinstance(principal, ArmPrincipal) or principal.adapter is None:
            return None
        for adapter, folder in host.adapters.items():
            if folder == principal.adapter:
                return adapter
        adapter = f"adapter{len(host.adapters)}"
        host.adapters[adapter] = principal.adapter
        return adapter

    def _reference(self, name: str, principal: Principal, host: _HostDraft, template: str | None) -> str | None:
        assert not isinstance(principal, PromptedPrincipal | RewardModelPrincipal)
        reference = principal.reference
        if reference == "none":
            return None
        if isinstance(reference, ModelConfig):
            host = self.host(reference, f"{name}.reference")
        return self.role(f"{name}.reference", host, None, template, None)
