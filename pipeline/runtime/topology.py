"""Builds the topology of a configuration: principals need roles, and roles that share weights share a host."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.sections import Config
from pipeline.principals.section import TUNED, PrincipalSection, RoleRequest
from pipeline.protocol.topology import BASE, HostPlan, HostRole, PrincipalPlan, Role, Topology
from pipeline.sections import ModelConfig


def build_topology(
    config: Config,
    identify: Callable[[ModelConfig], str] = lambda model: model.model,
    reads_text: Callable[[ModelConfig, bool], bool] = lambda model, scores: False,
) -> Topology:
    """Lay out roles and hosts.

    Args:
        config: base and principals.
        identify: names a model's weights; models of one name, dtype, device and number of ranks share a host.
        reads_text: whether a model, which scores or not, has other tokens than the base.
    """
    builder = _TopologyBuilder(config, identify, reads_text)
    builder.add_base()
    principals = tuple(builder.add_principal(name, section) for name, section in config.principals.items())
    hosts = tuple(
        HostPlan(
            each.name,
            each.model,
            tuple(each.roles),
            {name: folder for name, (folder, _) in each.adapters.items()},
            tuple(dict.fromkeys(each.serves)),
            each.reads_text,
            {name: use.objective for name, (_, use) in each.adapters.items() if use is not None},
        )
        for each in builder.hosts.values()
    )
    return Topology(hosts, {role.name: role for role in builder.roles.values()}, principals)


def models_of(config: Config) -> Iterator[tuple[str, ModelConfig]]:
    """Every model that the configuration names, with its dotted place."""
    yield BASE, config.base
    for name, principal in config.principals.items():
        for key, model in principal.models.items():
            yield f"principals.{name}.{key}", model


def adapters_of(config: Config) -> Iterator[tuple[str, str]]:
    """Every adapter folder that the configuration names, with its dotted place."""
    for name, principal in config.principals.items():
        for key, adapter in principal.adapters.items():
            yield f"principals.{name}.{key}", adapter


@dataclass(frozen=True, slots=True)
class _Use:
    """At which preference vector an adapter is used: an objective's unit vector, or (None) the row's own weights."""

    objective: str | None


@dataclass(slots=True)
class _HostBuilder:
    """A `HostPlan` while roles are added to it."""

    name: str
    model: ModelConfig
    roles: list[HostRole] = field(default_factory=list)
    adapters: dict[str, tuple[str, _Use | None]] = field(default_factory=dict)
    serves: list[str] = field(default_factory=list)
    reads_text: bool = False


class _TopologyBuilder:
    """Collects roles and hosts, without repeating any."""

    def __init__(
        self,
        config: Config,
        identify: Callable[[ModelConfig], str],
        reads_text: Callable[[ModelConfig, bool], bool],
    ) -> None:
        self._config = config
        self._identify = identify
        self._reads_text = reads_text
        self.hosts: dict[tuple[object, ...], _HostBuilder] = {}
        self.roles: dict[tuple[object, ...], Role] = {}

    def add_base(self) -> None:
        """The base's role, first of all."""
        base = self._config.base
        self._add_role(BASE, RoleRequest(), base.chat_template, base.chat_template_kwargs, own_kwargs=frozenset())

    def add_principal(self, name: str, section: PrincipalSection) -> PrincipalPlan:
        """The roles that the principal needs, those that are there already included."""
        roles = self._add_roles(name, section, section.roles())
        is_asked = any(rule.at_weights for rule in self._config.rules)
        at_weights = section.roles_at_weights() if is_asked else {}
        return PrincipalPlan(
            name, section.weight, section, roles, self._add_roles(f"{name}.at_weights", section, at_weights)
        )

    def _add_roles(self, name: str, section: PrincipalSection, requests: Mapping[str, RoleRequest]) -> dict[str, str]:
        """By part the names of the roles that give what a principal requests."""
        roles = {}
        for part, request in requests.items():
            # reward models and those with other tokens read prompts by their own template, others by the base's
            is_own = request.scoring is not None or self._reads_text(request.model or self._config.base, False)
            inherited = None if is_own else self._config.base.chat_template
            kwargs = section.chat_template_kwargs
            kwargs = kwargs if is_own else {**self._config.base.chat_template_kwargs, **kwargs}
            roles[part] = self._add_role(
                name if part == TUNED else f"{name}.{part}",
                request,
                section.template or inherited,
                kwargs,
                own_kwargs=frozenset(section.chat_template_kwargs),
                has_base_kwargs=not is_own,
            )
        return roles

    def _add_role(
        self,
        name: str,
        request: RoleRequest,
        template: str | None,
        template_kwargs: Mapping[str, Any],
        *,
        own_kwargs: frozenset[str],
        has_base_kwargs: bool = True,
    ) -> str:
        """The name of a role that gives what is requested: a new one, or one that gives the same."""
        host = self._host(name, request)
        adapter = None if request.adapter is None else self._adapter(host, request)
        # scores are a principal's own: each has its label, scale and interval
        own = name if request.scoring is not None else None
        prompt = (template, request.principle, request.takes_weights, request.placement)
        key = (host.name, own, adapter, *prompt, json.dumps(template_kwargs, sort_keys=True), own_kwargs)
        if key not in self.roles:
            self.roles[key] = Role(name, host.name, *prompt, template_kwargs, own_kwargs, has_base_kwargs)
            preference = self._preference(request) if request.at_weights else ()
            host.roles.append(HostRole(name, adapter, request.scoring, request.takes_weights, preference))
        return self.roles[key].name

    def _host(self, name: str, request: RoleRequest) -> _HostBuilder:
        """The host of the requested weights; a model scores or gives log-probabilities, not both."""
        model = request.model or self._config.base
        scores = request.scoring is not None
        split = (model.tensor_parallel, model.pipeline_parallel)
        placed = (model.dtype, model.quantization, model.device, split, model.trust_remote_code)
        key = (self._identify(model), *placed, scores)
        if key not in self.hosts:
            self.hosts[key] = _HostBuilder(name, model, reads_text=self._reads_text(model, scores))
        self.hosts[key].serves.append(name.partition(".")[0])
        return self.hosts[key]

    def _adapter(self, host: _HostBuilder, request: RoleRequest) -> str:
        """The name of an adapter, at its preference vector, on its host."""
        assert request.adapter is not None
        has_preference = request.at_weights or request.objective is not None
        wanted = (
            request.adapter,
            _Use(None if request.at_weights else request.objective) if has_preference else None,
        )
        for adapter, known in host.adapters.items():
            if known == wanted:
                return adapter
        adapter = f"adapter{len(host.adapters)}"
        host.adapters[adapter] = wanted
        return adapter

    def _preference(self, request: RoleRequest) -> tuple[tuple[str, int], ...]:
        """The objectives of an adapter that principals stand for, with the number of each."""
        found = []
        for number, section in enumerate(self._config.principals.values()):
            for other in section.roles().values():
                if other.adapter == request.adapter and other.objective is not None:
                    found.append((other.objective, number))
        return tuple(found)
