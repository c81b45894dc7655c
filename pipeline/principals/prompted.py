"""Kind `prompted`: a sentence says what the principal wants; no trained model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.principals.section import REFERENCE, TUNED, PrincipalSection, RoleRequest, log_ratio
from pipeline.sections import ModelConfig, Placement, model_from_name

if TYPE_CHECKING:
    from torch import Tensor


class PromptedPrincipal(PrincipalSection):
    """q(a) = log pi(a | principle, x) - log pi(a | x), by the base's weights or by `model`.

    With `negative_principle` the second prompt has that principle: q(a) = log pi(a | principle, x) - log pi(a |
    negative principle, x).
    """

    silent_because: ClassVar[str] = (
        "its prompt is the same with and without the principle, because the chat template drops system messages "
        "or the principal's template does not use `principle`"
    )
    kind: Literal["prompted"]
    principle: str = Field(min_length=1, description="what the principal asks for")
    negative_principle: str | None = Field(
        None, min_length=1, description="what the principal asks not to do; its prompt takes the plain one's place"
    )
    placement: Placement = Field(
        "auto",
        description="where the principle goes: the system message, the first user message, or (auto) the system "
        "message where the chat template writes it",
    )
    model: Annotated[ModelConfig | None, BeforeValidator(model_from_name)] = None

    @model_validator(mode="after")
    def _contrasts(self) -> PromptedPrincipal:
        if self.negative_principle == self.principle:
            raise ValueError("negative_principle is the principle itself, so that q would be 0 at every token")
        return self

    def roles(self) -> dict[str, RoleRequest]:
        """The model with the principle, and without it: the base itself where model and template are the base's.

        The second has the negative principle where there is one.
        """
        weighted = self.takes_weights
        return {
            TUNED: RoleRequest(
                self.model, principle=self.principle, takes_weights=weighted, placement=self.placement
            ),
            REFERENCE: RoleRequest(
                self.model,
                principle=self.negative_principle,
                takes_weights=weighted,
                placement="auto" if self.negative_principle is None else self.placement,
            ),
        }

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return log_ratio(outputs)
