"""What every kind of principal is: a section of the configuration, the roles that it needs, and its token reward.

A kind is one file: a section derived from `PrincipalSection` with a `kind` of its own, which says which roles it
needs (`roles`) and how their outputs become the token reward q (`rewards`). `pipeline.principals.kinds` lists the
kinds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, JsonValue

from pipeline.protocol.topology import Scoring
from pipeline.sections import ModelConfig, Placement, Section

if TYPE_CHECKING:  # a configuration is read without torch
    from torch import Tensor

Label = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)] | None  # an output: number or name
TUNED, REFERENCE = "tuned", "reference"  # parts: what the principal's model says, and what it is compared with


@dataclass(frozen=True, slots=True)
class RoleRequest:
    """One output that a principal needs at every step.

    Args:
        model: the model that gives it; None is the base's.
        adapter: folder, address or hub id of a LoRA adapter on that model.
        principle: what the principal asks for, which only this role reads.
        scoring: set for a sequence reward model, which scores candidates where others give log-probabilities.
        takes_weights: whether its output depends on the row's preference weights. They are in scope of its prompt
            template as `weights`, travel with its prompts, and rows of other weights share none of its prefixes.
        placement: which message the principle goes into: system, user, or auto, which looks at the template.
        objective: whose unit vector an adapter that depends on a preference vector is used at.
        at_weights: whether such an adapter is used at the row's own weights instead.
    """

    model: ModelConfig | None = None
    adapter: str | None = None
    principle: str | None = None
    scoring: Scoring | None = None
    takes_weights: bool = False
    placement: Placement = "auto"
    objective: str | None = None
    at_weights: bool = False


class PrincipalSection(Section):
    """What every principal has: its weight and its own prompt template.

    Derived classes add a `kind`, what it needs, and `silent_because`: why its q may be the same at every token.
    """

    silent_because: ClassVar[str]
    weight: float = Field(1.0, ge=0, description="how much its reward counts in rows without weights of their own")
    template: str | None = Field(
        None, description="Jinja chat template for this principal's prompt (messages, principle, weights in scope)"
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="what its chat template reads besides messages; base.chat_template_kwargs hold where it has none",
    )
    kind: str

    @abstractmethod
    def roles(self) -> dict[str, RoleRequest]:
        """The outputs that it needs, by part; `TUNED` is one of them and comes first.

        None for a kind that values text (`judged_by`).
        """

    def roles_at_weights(self) -> dict[str, RoleRequest]:
        """The outputs of one reward that all principals have together at the row's weights; empty: there is none."""
        return {}

    @abstractmethod
    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """The token reward q in nats and float64, from the outputs of its roles by part, which have one shape."""

    def describe(self, roles: Mapping[str, str]) -> str:
        """How q comes about, in a line, with the name of the role for each part."""
        return " - ".join(f"log p[{role}]" for role in roles.values())

    @property
    def judged_by(self) -> tuple[Mapping[str, Any], float] | None:
        """The section of a judge, and nats per point of its score, for kinds that value text and no tokens."""
        return None

    @property
    def takes_weights(self) -> bool:
        """Whether its prompts depend on the row's weights: its template names them."""
        return self.template is not None and "weights" in self.template

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that it names, by key of its section."""
        values = {key: getattr(self, key) for key in type(self).model_fields}
        return {key: value for key, value in values.items() if isinstance(value, ModelConfig)}

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that it names, by key of its section."""
        values = {key: getattr(self, key) for key in type(self).model_fields if key.endswith("adapter")}
        return {key: value for key, value in values.items() if value is not None}


def log_ratio(outputs: Mapping[str, Tensor]) -> Tensor:
    """log p_tuned(a) - log p_reference(a), or log p_tuned(a) where there is no reference."""
    tuned = outputs[TUNED].double()
    return tuned - outputs[REFERENCE].double() if REFERENCE in outputs else tuned
