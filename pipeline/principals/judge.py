"""Kind `judge`: whatever scores text steers games over blocks or whole answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, JsonValue, TypeAdapter, field_serializer, field_validator

from pipeline.principals.section import PrincipalSection, RoleRequest

if TYPE_CHECKING:
    from torch import Tensor


class JudgePrincipal(PrincipalSection):
    """q of a block or an answer: `scale` times what it adds to the judge's score of the text."""

    silent_because: ClassVar[str] = "its judge gives all proposals the same score"
    kind: Literal["judge"]
    judge: dict[str, Any] = Field(description="a judge, as in evaluation.judges: {kind: sentiment}")
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="nats that one point of its score is worth")

    @field_validator("judge")
    @classmethod
    def _is_a_section(cls, judge: dict[str, Any]) -> dict[str, Any]:
        """A program may give a Python function where a file names one."""
        TypeAdapter(JsonValue).validate_python({key: value for key, value in judge.items() if not callable(value)})
        return judge

    @field_serializer("judge", when_used="json")
    def _with_names(self, judge: dict[str, Any]) -> dict[str, JsonValue]:
        return {key: _name(value) if callable(value) else value for key, value in judge.items()}

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


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
