"""Kind `reward_model`: a sequence reward model that scores what each candidate adds to the answer so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pipeline.principals.section import TUNED, Label, PrincipalSection, RoleRequest
from pipeline.protocol.topology import Scoring
from pipeline.sections import ModelConfig, model_from_name

if TYPE_CHECKING:
    from torch import Tensor


Pooling = Literal["auto", "last_token", "end_of_text"]
ENDS: Mapping[str, bool | None] = {"auto": None, "last_token": False, "end_of_text": True}


class RewardModelPrincipal(PrincipalSection):
    """q(a) = sign x scale x (RM(prefix + a) - RM(prefix)): a reward model that reads from left to right.

    It scores the base's likeliest candidates; the others count as the worst of those. Between scored steps it is
    indifferent.
    """

    silent_because: ClassVar[str] = (
        "its head gives every text the same score, `label` picks an output that never changes, or `scale` is too "
        "small"
    )
    kind: Literal["reward_model"]
    model: Annotated[ModelConfig, BeforeValidator(model_from_name), Field(description="the reward model")]
    candidates: int = Field(10, ge=1, le=4096, description="of the base's likeliest, how many it scores")
    interval: int = Field(1, ge=1, description="tokens from one scored step to the next")
    scale: float = Field(1.0, gt=0, description="nats that one point of its score is worth")
    sign: Literal[1, -1] = Field(1, description="-1 where a lower score is better")
    label: Label = Field(None, description="which of its outputs counts, by its number or name, where it has several")
    pooling: Pooling = Field(
        "auto",
        description="last_token: an answer is scored at its last token. end_of_text: as if it ended there. auto: as "
        "the model was trained, where its files say so, else last_token",
    )

    def roles(self) -> dict[str, RoleRequest]:
        """Its score, already scaled and signed."""
        scoring = Scoring(self.candidates, self.interval, self.sign * self.scale, self.label, ENDS[self.pooling])
        return {TUNED: RoleRequest(self.model, scoring=scoring, takes_weights=self.takes_weights)}

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs[TUNED].double()
