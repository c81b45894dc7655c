"""The topology of a replica: its roles, the host that serves each, and the principals whose rewards they compute.

A role is one output that is needed at every step: a distribution over tokens, or a reward model's scores. Principals
that need the same output share a role; roles that share weights share a host and one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.sections import ModelConfig, Placement

if TYPE_CHECKING:
    from pipeline.principals.section import PrincipalSection

BASE = "base"  # the name of the base's role, and of its host


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a sequence reward model scores for a principal.

    Args:
        candidates: how many of the base's likeliest candidates it scores.
        interval: tokens from one scored step to the next.
        factor: nats that one point of its score is worth; negative where a lower score is better.
        label: which of its outputs counts, by its number or name; None where it has one.
        ends: whether a text is scored as if it ended there; None: as the head was trained.
    """

    candidates: int
    interval: int
    factor: float
    label: int | str | None = None
    ends: bool | None = None


@dataclass(frozen=True, slots=True)
class HostRole:
    """A role as its host knows it.

    Args:
        name: by which the coordinator asks for it.
        adapter: its LoRA adapter's name on this host, if any.
        scoring: set where the host is a sequence reward model.
        takes_weights: whether its output depends on the row's preference weights.
        preference: where its adapter is used at the row's own weights: each objective that a principal stands for,
            and the number of that principal.
    """

    name: str
    adapter: str | None = None
    scoring: Scoring | None = None
    takes_weights: bool = False
    preference: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Role:
    """A role as the coordinator knows it: where it is served and what its prompt looks like.

    Args:
        name: of the role.
        host: the name of the host that serves it.
        chat_template: Jinja template of its prompt; None is the tokenizer's own.
        principle: put into the prompt.
        takes_weights: whether the row's weights are in scope of the template and travel with the prompt.
        placement: which message the principle goes into: system, user, or auto, which looks at the template.
        template_kwargs: values that the template reads besides the messages.
        own_kwargs: names of those that are the principal's own; the others are the base's.
        has_base_kwargs: whether the base's values, and a row's in their place, are given to its template.
    """

    name: str
    host: str
    chat_template: str | None = None
    principle: str | None = None
    takes_weights: bool = False
    placement: Placement = "auto"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    own_kwargs: frozenset[str] = frozenset()
    has_base_kwargs: bool = True

    def with_base_kwargs(self, row_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a row's values change in this role's: a principal's own values come first."""
        return {k: v for k, v in row_kwargs.items() if self.has_base_kwargs and k not in self.own_kwargs}


@dataclass(frozen=True, slots=True)
class PrincipalPlan:
    """A principal of a run.

    Args:
        name: its name in the configuration.
        weight: its configured preference weight.
        section: its section, which makes its token reward out of the outputs of its roles.
        roles: the name of a role for each part of its reward.
        roles_at_weights: likewise, of the reward that all principals have together at the row's weights; empty where
            no rule of the run takes that.
    """

    name: str
    weight: float
    section: PrincipalSection
    roles: Mapping[str, str]
    roles_at_weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Its kind, as `pipeline.principals.kinds` lists them."""
        return self.section.kind


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One set of weights on one device.

    Args:
        name: of the host.
        model: the section that names the weights.
        roles: what it serves; the base's comes first where it is the base's host.
        adapters: adapter folders by the names that roles use.
        serves: the principals (and "base") that need it, for messages.
        reads_text: whether its tokens are not the base's, so that it reads answers as text.
        objectives: by the names of those adapters that depend on a preference vector: the objective whose unit vector
            each is used at, or None where it is used at the row's own weights.
    """

    name: str
    model: ModelConfig
    roles: tuple[HostRole, ...]
    adapters: Mapping[str, str]
    serves: tuple[str, ...]
    reads_text: bool = False
    objectives: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def is_reward_model(self) -> bool:
        """Whether it scores candidates, instead of giving log-probabilities."""
        return any(role.scoring is not None for role in self.roles)

    @property
    def scores_branches(self) -> bool:
        """Whether it needs the base's candidates, which it reads as branches of each row."""
        return self.is_reward_model or self.reads_text


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts, roles and principals of one run.

    Args:
        hosts: the base's first; its first role is the base.
        roles: by name.
        principals: in the order of the configuration, which is that of all weights, rewards and payments.
    """

    hosts: tuple[HostPlan, ...]
    roles: Mapping[str, Role]
    principals: tuple[PrincipalPlan, ...]

    @property
    def weights(self) -> dict[str, float]:
        """The configured weights by principal."""
        return {principal.name: principal.weight for principal in self.principals}

    @property
    def takes_weights(self) -> bool:
        """Whether some role's output depends on the row's weights."""
        return any(role.takes_weights for role in self.roles.values())
