"""Kind `preference_arm`: one reward model for all objectives, which depends on a preference vector (PARM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pipeline.principals.section import REFERENCE, TUNED, PrincipalSection, RoleRequest, log_ratio
from pipeline.sections import ModelConfig, ReferenceConfig, model_from_name

if TYPE_CHECKING:
    from torch import Tensor


def _reference_from_name(value: Any) -> Any:
    return value if value in ("backbone", "none") else model_from_name(value)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class PreferenceArmPrincipal(PrincipalSection):
    """q(a) = log pi_arm(a | x; p) - log pi_ref(a | x), where p is a preference vector.

    `adapter` is a PBLoRA adapter on `model` (the base when not given), of which `objective` is one. Principals that
    name the same adapter share one model.
    """

    silent_because: ClassVar[str] = "the adapter changes nothing at this preference vector, as before it is trained"
    kind: Literal["preference_arm"]
    model: Annotated[ModelConfig | None, BeforeValidator(model_from_name)] = None
    adapter: str = Field(min_length=1, description="folder, hub id or address of the PARM adapter")
    objective: Annotated[str, BeforeValidator(_as_text)] = Field(
        description="which of the adapter's objectives: its name, or its number from 0"
    )
    preference: Literal["unit", "weights"] = Field(
        "unit",
        description="at which vector the adapter is used: the objective's unit vector (CAGE+), or the row's own "
        "weights of all principals of this adapter, scaled to sum to 1 (PARM, with rule: linear)",
    )
    reference: Annotated[
        ReferenceConfig | Literal["backbone", "none"],
        BeforeValidator(_reference_from_name),
        Field(description="what it is compared with: backbone (the model without the adapter), a model, or none"),
    ] = "backbone"

    def roles(self) -> dict[str, RoleRequest]:
        """The reward model at its preference vector; and its reference unless that is "none"."""
        return self._roles(at_weights=self.preference == "weights")

    def roles_at_weights(self) -> dict[str, RoleRequest]:
        """The adapter at the row's own weights (rule `parm`); and its reference unless that is "none"."""
        return self._roles(at_weights=True)

    def _roles(self, *, at_weights: bool) -> dict[str, RoleRequest]:
        roles = {
            TUNED: RoleRequest(
                self.model,
                adapter=self.adapter,
                takes_weights=self.takes_weights or at_weights,
                objective=self.objective,
                at_weights=at_weights,
            )
        }
        if self.reference != "none":
            model = self.reference if isinstance(self.reference, ModelConfig) else self.model
            roles[REFERENCE] = RoleRequest(model, takes_weights=self.takes_weights)
        return roles

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return log_ratio(outputs)
