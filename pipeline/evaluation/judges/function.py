"""A plain Python function as a judge.

A program gives the function where a configuration file has the section of a judge:

    def count_questions(answers):
        return [float(answer.text.count("?")) for answer in answers]

    config = EvaluateConfig.model_validate({
        ...,
        "evaluation": {"judges": {"curious": count_questions}, "objectives": {"helpful": "curious"}},
    })
    evaluate(config, cache_folder, sys.stdout)

`FunctionJudge(function=count_questions, sign="lower", version="2")` sets options as well. A configuration file
names the function: `{kind: function, function: my_judges:count_questions}`, or `judges.py:count_questions`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, field_serializer, field_validator

from pipeline.errors import CageError, ConfigurationError
from pipeline.evaluation.judges.interface import (
    Judge,
    JudgeConfig,
    JudgeContext,
    JudgedAnswer,
    JudgeFailed,
    NoScore,
)
from pipeline.quoting import quote

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource

ScoreFunction = Callable[[Sequence[JudgedAnswer]], Iterable[float]]
NAMED = re.compile(r"(?:[A-Za-z_][\w.]*|.+\.py):[A-Za-z_]\w*")


class FunctionJudge(JudgeConfig):
    """A Python function that takes a sequence of `JudgedAnswer` and returns one number per answer, in order.

    A file names it as `module:function` or `path/file.py:function`; a program may give the function itself. An answer
    for which it raises an error, returns NaN or takes longer than `timeout_s` has no score, and is counted.

    Stored scores are kept as long as the source text and `version` stay the same: of the function, or of its whole
    module where a file names it. Change `version` when something changes that is called or read elsewhere; a function
    without source text needs one.
    """

    kind: Literal["function"] = "function"
    function: Any = Field(description="module:function or path/file.py:function; in a program, a Python function")
    version: str | None = Field(None, description="change it when the scores change and the source text does not")
    timeout_s: float | None = Field(None, gt=0, description="longest time for one answer; null: no limit")

    @field_validator("function")
    @classmethod
    def _is_function(cls, function: Any) -> Any:
        if callable(function):
            return function
        if not isinstance(function, str) or not NAMED.fullmatch(function):
            raise ValueError(
                f"must be module:function or path/file.py:function, such as my_judges:politeness; got {function!r}"
            )
        return function

    @field_serializer("function", when_used="json")
    def _name(self, function: Any) -> str:
        if isinstance(function, str):
            return function
        named = function if hasattr(function, "__qualname__") else type(function)
        return f"{named.__module__}:{named.__qualname__}"

    def check(self, context: JudgeContext) -> None:
        _resolve(self.function, context.name)

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        described = super().identity(source)
        del described["timeout_s"]  # it decides whether there is a score, not which
        function = _resolve(self.function, self._name(self.function))
        try:
            text = inspect.getsource(inspect.getmodule(function) or function) if self._is_named else None
            text = inspect.getsource(function) if text is None else text
        except (OSError, TypeError):
            if self.version is None:
                raise ConfigurationError(
                    f"the judge {self._name(self.function)} has no source text by which to know its scores again: "
                    "give FunctionJudge a version"
                ) from None
            text = ""
        return {**described, "source": hashlib.sha256(text.encode()).hexdigest()}

    @property
    def _is_named(self) -> bool:
        return isinstance(self.function, str)

    def load(self, context: JudgeContext) -> Judge:
        function = _resolve(self.function, context.name)
        return _CheckedFunction(context.name, function, self.factor, self.timeout_s)


def section_of_function(value: Any) -> Any:
    """The section of a bare function; any other value as it is."""
    return FunctionJudge(function=value) if callable(value) else value


def _resolve(function: Any, name: str) -> ScoreFunction:
    """The function itself, imported where it is named. Raises ConfigurationError where there is none."""
    if not isinstance(function, str):
        return cast(ScoreFunction, function)
    place, _, attribute = function.rpartition(":")
    title = f"judge {name}: function {function}"
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise ConfigurationError(f"{title}: there is no file {Path(place).absolute()}") from None
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigurationError(f"{title} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        known = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise ConfigurationError(f"{title}: {place} has no function {attribute}; it has {', '.join(known) or 'none'}")
    return cast(ScoreFunction, found)


def _module_of_file(path: Path) -> ModuleType:
    """The module in a file, imported once a process by its content."""
    text = path.read_bytes()
    name = f"cage_judge_{hashlib.sha256(str(path.absolute()).encode() + text).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@dataclass(frozen=True, slots=True)
class _CheckedFunction:
    """Calls the function, and refuses anything but one number per answer.

    Where it fails for several answers at once they are tried one by one, so that one answer costs only its own score.
    """

    name: str
    function: ScoreFunction
    factor: float
    timeout_s: float | None = None

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        if not answers:
            return []
        if self.timeout_s is not None:
            return [self._within_time(answer) for answer in answers]
        try:
            return [self._scaled(value) for value in self._call(answers)]
        except _Raised as error:
            if len(answers) == 1:
                raise self._failed(error) from error.cause
            scores, last = [], error
            for answer in answers:
                try:
                    [value] = self._call([answer])
                    scores.append(self._scaled(value))
                except _Raised as own:
                    scores.append(NoScore(str(own)))
                    last = own
            if all(isinstance(each, NoScore) for each in scores):
                raise self._failed(error) from last.cause
            return scores

    def _call(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        try:
            found = self.function(tuple(answers))  # a list could come back shorter
            if isinstance(found, str | bytes | Mapping | Set):  # iterable too, but its parts are no scores in order
                raise TypeError(f"it must return a list of numbers; got {quote(found)}")
            scores = [_as_number(value) for value in found]
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise _Raised(error) from error
        if len(scores) != len(answers):
            raise CageError(f"judge {self.name} must return one score per answer: {len(answers)}; got {len(scores)}")
        return scores

    def _within_time(self, answer: JudgedAnswer) -> float:
        """The score of one answer. A call that takes too long goes on in its thread, which dies with the process."""
        found: queue.SimpleQueue[list[float] | Exception] = queue.SimpleQueue()

        def run() -> None:
            try:
                found.put(self._call([answer]))
            except Exception as error:
                found.put(error)

        threading.Thread(target=run, daemon=True, name=f"judge {self.name}").start()
        try:
            result = found.get(timeout=self.timeout_s)
        except queue.Empty:
            return NoScore(f"it took longer than {self.timeout_s:g} s", is_final=False)
        if isinstance(result, _Raised):
            return NoScore(str(result))
        if isinstance(result, Exception):
            raise result
        return self._scaled(result[0])

    def _scaled(self, value: float) -> float:
        return value * self.factor if math.isfinite(value) else NoScore(f"it returned {value}")

    def _failed(self, error: _Raised) -> JudgeFailed:
        return JudgeFailed(f"judge {self.name} failed: {error}")


def _as_number(value: Any) -> float:
    """A score. Raises TypeError for text: "5" is as often a reply that nobody has parsed."""
    if isinstance(value, str | bytes):
        raise TypeError(f"a score must be a number; got {quote(value)}")
    return float(value)


class _Raised(Exception):
    """What the user's function raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}")
        self.cause = cause
