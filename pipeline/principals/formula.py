"""Kind `formula`: arithmetic of the log-probabilities of several models, prompts and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.principals.arithmetic import Formula
from pipeline.principals.section import TUNED, PrincipalSection, RoleRequest
from pipeline.sections import ModelConfig, Placement, Section, model_from_name

if TYPE_CHECKING:
    from torch import Tensor

BASE_TERM = "base"  # the name that stands for the base itself
RESERVED = (BASE_TERM, TUNED, "max", "min")


class FormulaTerm(Section):
    """What a name in a formula stands for: log pi(a) of a model, with an adapter, a principle, or both."""

    model: Annotated[
        ModelConfig | None, BeforeValidator(model_from_name), Field(description="null: the base's weights")
    ] = None
    adapter: str | None = Field(None, description="folder, address or hub id of a LoRA adapter on that model")
    principle: str | None = Field(None, min_length=1, description="what its prompt asks for")
    placement: Placement = Field("auto", description="where the principle goes, as in kind prompted")


class FormulaPrincipal(PrincipalSection):
    """q(a) = a formula of log-probabilities, such as `formal - 0.5 * max(rude, toxic)`.

    Each name stands for log pi(a) of one of `terms`; `base` is the base's own. There may be numbers, +, -, *, / by a
    number, parentheses, max(...) and min(...).
    """

    silent_because: ClassVar[str] = (
        "its terms cancel: the same weights and prompts stand behind them, or the numbers before them sum to zero"
    )
    kind: Literal["formula"]
    formula: str = Field(min_length=1, description="arithmetic of the terms")
    terms: dict[str, FormulaTerm] = Field(default_factory=dict, description="what each name in the formula is")

    @model_validator(mode="after")
    def _complete(self) -> FormulaPrincipal:
        names = Formula(self.formula).names
        for name in self.terms:
            if not name.isidentifier() or name in RESERVED:
                raise ValueError(
                    f"a term's name has letters, digits and _, starts with a letter and is none of "
                    f"{', '.join(RESERVED)}; got {name!r}"
                )
        if unknown := [name for name in names if name not in (*self.terms, BASE_TERM)]:
            raise ValueError(f"the formula names {unknown[0]!r}, which is none of terms ({self._listed()}) nor base")
        if unused := [name for name in self.terms if name not in names]:
            raise ValueError(f"terms.{unused[0]} has no effect: the formula does not name it")
        for name, term in self.terms.items():
            if term.placement != "auto" and term.principle is None:
                raise ValueError(f"terms.{name}.placement has no effect without a principle")
        return self

    def roles(self) -> dict[str, RoleRequest]:
        """The output of each name."""
        return {part: self._request(name) for part, name in self._parts().items()}

    def rewards(self, outputs: Mapping[str, Tensor]) -> Tensor:
        terms = {name: outputs[part].double() for part, name in self._parts().items()}
        return Formula(self.formula).value(terms)

    def describe(self, roles: Mapping[str, str]) -> str:
        """The formula, with the role of each name."""
        shown = ", ".join(f"{name} = log p[{roles[part]}]" for part, name in self._parts().items())
        return f"{self.formula} ({shown})"

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that its terms name."""
        return {f"terms.{name}.model": term.model for name, term in self.terms.items() if term.model is not None}

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that its terms name."""
        return {
            f"terms.{name}.adapter": term.adapter for name, term in self.terms.items() if term.adapter is not None
        }

    def _parts(self) -> dict[str, str]:
        """The name of a term by part; the first is the part that every kind has."""
        first, *others = Formula(self.formula).names
        return {TUNED: first, **{name: name for name in others}}

    def _request(self, name: str) -> RoleRequest:
        term = FormulaTerm() if name == BASE_TERM else self.terms[name]
        return RoleRequest(
            term.model,
            adapter=term.adapter,
            principle=term.principle,
            takes_weights=self.takes_weights,
            placement=term.placement,
        )

    def _listed(self) -> str:
        return ", ".join(self.terms) or "none"
