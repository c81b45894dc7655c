"""Kind `judge`: whatever scores text steers games over blocks or whole answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from pipeline.principals.section import PrincipalSection, RoleRequest

if TYPE_CHECKING:
    from torch import Tensor


class JudgePrincipal(PrincipalSection):
    """q of a block or an answer: `scale` times what it adds to the judge's score of the text."""

    silent_because: ClassVar[str] = "its judge gives all proposals the same score"
    kind: Literal["judge"]
    judge: dict[str, JsonValue] = Field(description="a judge, as in evaluation.judges: {kind: sentiment}")
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="nats that one point of its score is worth")

    @property
    def judged_by(self) -> tuple[Mapping[str, Any], float]:
        """Its judge, and nats per point."""
        return self.judge, self.scale

    def roles(self) -> dict[str, RoleRequest]:
        """None: it reads text, in the coordinator's process."""
        return {}

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Not called: tokens have no value of their own."""
        raise AssertionError(f"a judge does not value tokens; got {sorted(outputs)}")
