"""Kind `tuned_pair`: a tuned policy and what it was tuned from, such as a DPO policy and its reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pipeline.principals.section import REFERENCE, TUNED, PrincipalSection, RoleRequest, log_ratio
from pipeline.sections import ModelConfig, ReferenceConfig, model_from_name

if TYPE_CHECKING:
    from torch import Tensor


class TunedPairPrincipal(PrincipalSection):
    """q(a) = log pi_model(a | x) - log pi_reference(a | x): for example a DPO policy and its reference."""

    silent_because: ClassVar[str] = "model and reference have the same weights"
    kind: Literal["tuned_pair"]
    model: Annotated[ModelConfig, BeforeValidator(model_from_name), Field(description="the tuned policy")]
    reference: Annotated[
        ReferenceConfig, BeforeValidator(model_from_name), Field(description="the policy that it was tuned from")
    ]

    def roles(self) -> dict[str, RoleRequest]:
        """Both policies."""
        weighted = self.takes_weights
        return {
            TUNED: RoleRequest(self.model, takes_weights=weighted),
            REFERENCE: RoleRequest(self.reference, takes_weights=weighted),
        }

    @staticmethod
    def rewards(outputs: Mapping[str, Tensor]) -> Tensor:
        return log_ratio(outputs)
