"""A plain Python function as a judge.

A program gives the function where a configuration file has the section of a judge:

    def count_questions(answers):
        return [float(answer.text.count("?")) for answer in answers]

    config = EvaluateConfig.model_validate({
        ...,
        "evaluation": {"judges": {"curious": count_questions}, "objectives": {"helpful": "curious"}},
    })
    evaluate(config, cache_folder, sys.stdout)

`FunctionJudge(function=count_questions, sign="lower", version="2")` sets options as well.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_serializer, field_validator

from pipeline.errors import CageError, ConfigurationError
from pipeline.evaluation.judges.interface import Judge, JudgeConfig, JudgeContext, JudgedAnswer

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource

ScoreFunction = Callable[[Sequence[JudgedAnswer]], Iterable[float]]


class FunctionJudge(JudgeConfig):
    """A Python function that takes a sequence of `JudgedAnswer` and returns one number per answer, in order.

    Stored scores are kept as long as the function's source text and `version` stay the same. Change `version` when
    something changes that the function calls or reads; a function without source text needs one.
    """

    kind: Literal["function"] = "function"
    function: Any = Field(description="a Python function; a configuration file cannot hold one")
    version: str | None = Field(None, description="change it when the scores change and the source text does not")

    @field_validator("function")
    @classmethod
    def _is_callable(cls, function: Any) -> Any:
        if not callable(function):
            raise ValueError("must be a Python function, which a program gives and a file cannot")
        return function

    @field_serializer("function", when_used="json")
    def _name(self, function: Any) -> str:
        named = function if hasattr(function, "__qualname__") else type(function)
        return f"{named.__module__}:{named.__qualname__}"

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        try:
            text = inspect.getsource(self.function)
        except (OSError, TypeError):
            if self.version is None:
                raise ConfigurationError(
                    f"the judge {self._name(self.function)} has no source text by which to know its scores again: "
                    "give FunctionJudge a version"
                ) from None
            text = ""
        return {**super().identity(source), "source": hashlib.sha256(text.encode()).hexdigest()}

    def load(self, context: JudgeContext) -> Judge:
        return _CheckedFunction(context.name, self.function, self.factor)


def section_of_function(value: Any) -> Any:
    """The section of a bare function; any other value as it is."""
    return FunctionJudge(function=value) if callable(value) else value


@dataclass(frozen=True, slots=True)
class _CheckedFunction:
    """Calls the function, and refuses anything but one number per answer."""

    name: str
    function: ScoreFunction
    factor: float

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        try:
            scores = [float(value) for value in self.function(answers)]
        except Exception as error:  # the user's code may raise anything
            raise CageError(f"judge {self.name} failed: {type(error).__name__}: {error}") from error
        if len(scores) != len(answers):
            raise CageError(f"judge {self.name} must return one score per answer: {len(answers)}; got {len(scores)}")
        return [self.factor * score + 0.0 for score in scores]  # -0.0 becomes 0.0
