"""Kind `value`: a value function, which says at every token what the answer so far will be worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.principals.section import TUNED, Label, PrincipalSection, RoleRequest
from pipeline.protocol.topology import Scoring
from pipeline.sections import ModelConfig, model_from_name

if TYPE_CHECKING:
    from torch import Tensor


class ValuePrincipal(PrincipalSection):
    """q(a) = sign x scale x (V(prefix + a) - V(prefix)): a causal LM with a value head on its hidden states.

    The head is in the model's own weights, as TRL's AutoModelForCausalLMWithValueHead writes it (`v_head.summary`),
    or in `value_head.safetensors` beside the model or the adapter (`weight` [1, hidden], `bias` [1]). It values the
    base's likeliest candidates; the others count as the worst of those. Between valued steps it is indifferent.
    """

    silent_because: ClassVar[str] = "its head gives every text the same value, or `scale` is too small"
    kind: Literal["value"]
    model: Annotated[
        ModelConfig | None,
        BeforeValidator(model_from_name),
        Field(description="the model with the head, or the adapter's backbone; null: the base"),
    ] = None
    adapter: str | None = Field(None, description="LoRA adapter with value_head.safetensors in its folder")
    candidates: int = Field(10, ge=1, le=4096, description="of the base's likeliest, how many it values")
    interval: int = Field(1, ge=1, description="tokens from one valued step to the next")
    scale: float = Field(1.0, gt=0, description="nats that one point of its value is worth")
    sign: Literal[1, -1] = Field(1, description="-1 where a lower value is better")
    label: Label = Field(None, description="which of its outputs counts, by its number or name, where it has several")

    @model_validator(mode="after")
    def _complete(self) -> ValuePrincipal:
        if self.model is None and self.adapter is None:
            raise ValueError("kind value needs a model with a value head, or an adapter with one beside it")
        return self

    def roles(self) -> dict[str, RoleRequest]:
        """Its value, already scaled and signed."""
        scoring = Scoring(self.candidates, self.interval, self.sign * self.scale, self.label, ends=False)
        request = RoleRequest(self.model, adapter=self.adapter, scoring=scoring, takes_weights=self.takes_weights)
        return {TUNED: request}

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs[TUNED].double()
