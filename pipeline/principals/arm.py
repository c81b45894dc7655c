"""Kind `arm`: an autoregressive reward model, as a causal LM or a LoRA adapter (GenARM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.principals.section import REFERENCE, TUNED, PrincipalSection, RoleRequest, log_ratio
from pipeline.sections import ModelConfig, ReferenceConfig, model_from_name

if TYPE_CHECKING:
    from torch import Tensor


def _reference_from_name(value: Any) -> Any:
    return value if value in ("backbone", "none") else model_from_name(value)


class ArmPrincipal(PrincipalSection):
    """q(a) = log pi_arm(a | x) - log pi_ref(a | x): an autoregressive reward model.

    `model` is a causal LM; or `adapter` a PEFT LoRA adapter on `model` (the base when not given). `reference`
    is another model, "backbone" (the adapter's model without the adapter) or "none".
    """

    silent_because: ClassVar[str] = (
        "the adapter changes nothing (it matches no layer, or its matrices are zero), or model and reference have "
        "the same weights"
    )
    kind: Literal["arm"]
    model: Annotated[ModelConfig | None, BeforeValidator(model_from_name)] = None
    adapter: str | None = Field(None, description="folder, hub id or address of a PEFT LoRA adapter")
    reference: Annotated[
        ReferenceConfig | Literal["backbone", "none"] | None, BeforeValidator(_reference_from_name)
    ] = None

    @model_validator(mode="after")
    def _complete(self) -> ArmPrincipal:
        if self.model is None and self.adapter is None:
            raise ValueError("kind arm needs a model, an adapter, or both")
        if self.reference == "backbone" and self.adapter is None:
            raise ValueError("reference: backbone needs an adapter; give a reference model or none")
        if self.reference is None and self.adapter is None:
            raise ValueError("kind arm without an adapter needs a reference: a model or none")
        return self

    def roles(self) -> dict[str, RoleRequest]:
        """The reward model; and its reference unless that is "none"."""
        weighted = self.takes_weights
        roles = {TUNED: RoleRequest(self.model, adapter=self.adapter, takes_weights=weighted)}
        if self.reference != "none":
            model = self.reference if isinstance(self.reference, ModelConfig) else self.model
            roles[REFERENCE] = RoleRequest(model, takes_weights=weighted)
        return roles

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return log_ratio(outputs)
