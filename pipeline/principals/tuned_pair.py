"""Kind `tuned_pair`: a tuned policy and what it was tuned from, such as a DPO policy and its reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.principals.section import REFERENCE, TUNED, PrincipalSection, RoleRequest, log_ratio
from pipeline.sections import ModelConfig, ReferenceConfig, model_from_name

if TYPE_CHECKING:
    from torch import Tensor


def _reference_from_name(value: Any) -> Any:
    return value if value == "backbone" else model_from_name(value)


class TunedPairPrincipal(PrincipalSection):
    """q(a) = log pi_tuned(a | x) - log pi_reference(a | x): for example a DPO policy and its reference.

    Each side is a model, or a PEFT LoRA adapter on `model` (the base when not given). The reference is `reference`,
    `reference_adapter`, or that adapter on that reference; `reference: backbone` is the model without an adapter.
    """

    silent_because: ClassVar[str] = "model and reference have the same weights"
    kind: Literal["tuned_pair"]
    model: Annotated[
        ModelConfig | None, BeforeValidator(model_from_name), Field(description="the tuned policy, or its backbone")
    ] = None
    adapter: str | None = Field(None, description="LoRA adapter of the tuned policy")
    reference: Annotated[
        ReferenceConfig | Literal["backbone"] | None,
        BeforeValidator(_reference_from_name),
        Field(description="the policy that it was tuned from"),
    ] = None
    reference_adapter: str | None = Field(None, description="LoRA adapter of the policy that it was tuned from")

    @model_validator(mode="after")
    def _complete(self) -> TunedPairPrincipal:
        if self.model is None and self.adapter is None:
            raise ValueError("kind tuned_pair needs a model, an adapter, or both")
        if self.reference is None and self.reference_adapter is None:
            raise ValueError("kind tuned_pair needs a reference: a model, backbone, or a reference_adapter")
        if self.reference == "backbone" and (self.adapter is None or self.reference_adapter is not None):
            raise ValueError("reference: backbone needs an adapter and no reference_adapter: it is the model without")
        if self.adapter is not None and self.adapter == self.reference_adapter and self._backbone == self.model:
            raise ValueError("adapter and reference_adapter are the same, so that q would be 0 at every token")
        return self

    @property
    def _backbone(self) -> ModelConfig | None:
        """The model of the reference."""
        return self.reference if isinstance(self.reference, ModelConfig) else self.model

    def roles(self) -> dict[str, RoleRequest]:
        """Both policies."""
        weighted = self.takes_weights
        return {
            TUNED: RoleRequest(self.model, adapter=self.adapter, takes_weights=weighted),
            REFERENCE: RoleRequest(self._backbone, adapter=self.reference_adapter, takes_weights=weighted),
        }

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return log_ratio(outputs)
