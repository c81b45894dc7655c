"""The configuration of an evaluation: a run over a grid, its judges, and how its rules are compared."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import Field, model_validator

from pipeline.config.sections import Config
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.sections import Section

JUDGE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
KEY_COLUMNS = ("row_id", "variant", "sample", "_errors")


class BootstrapConfig(Section):
    """Intervals by resampling prompts with replacement."""

    samples: int = Field(1000, ge=100, le=100_000, description="resamplings of the prompts")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    seed: int = Field(0, ge=0, lt=2**63, description="of the resampling")


class EvaluationConfig(Section):
    """How answers are judged and rules compared.

    Nothing here changes the answers: with other settings, the same run is scored or compared again.
    """

    judges: dict[str, AnyJudge] = Field(default_factory=dict, description="judges by name, each of a kind")
    objectives: dict[str, str] | None = Field(
        None, description="{principal: judge}: which judge measures which; null: judges named as principals"
    )
    reference_point: dict[str, float] | None = Field(
        None,
        description="of the hypervolume, {principal: score}; null: of each objective the lowest mean of everything "
        "compared, less a tenth of its range",
    )
    bootstrap: BootstrapConfig = BootstrapConfig()


class EvaluateConfig(Config):
    """A run and its evaluation."""

    evaluation: EvaluationConfig

    @property
    def objectives(self) -> dict[str, str]:
        """By principal the name of the judge that measures it, in the order of the principals."""
        given = self.evaluation.objectives
        if given is None:
            given = {name: name for name in self.principals if name in self.evaluation.judges}
        return {name: given[name] for name in self.principals if name in given}

    @model_validator(mode="after")
    def _judges_fit(self) -> EvaluateConfig:
        for name, judge in self.evaluation.judges.items():
            if not JUDGE_NAME.fullmatch(name) or name in KEY_COLUMNS:
                raise ValueError(
                    f"a judge's name has letters, digits, _ and -, starts with a letter and is none of "
                    f"{', '.join(KEY_COLUMNS)}; got {name!r}"
                )
            if judge.measured_principal not in (None, *self.principals):
                raise ValueError(
                    f"evaluation.judges.{name}.principal must be one of {_listed(self.principals)}; "
                    f"got {judge.measured_principal!r}"
                )
        return self

    @model_validator(mode="after")
    def _objectives_fit(self) -> EvaluateConfig:
        for principal, judge in (self.evaluation.objectives or {}).items():
            if principal not in self.principals:
                raise ValueError(
                    f"evaluation.objectives names the unknown principal {principal!r}; "
                    f"principals: {_listed(self.principals)}"
                )
            if judge not in self.evaluation.judges:
                raise ValueError(
                    f"evaluation.objectives.{principal} must be one of the judges "
                    f"{_listed(self.evaluation.judges)}; got {judge!r}"
                )
        if not self.objectives:
            raise ValueError(
                "an evaluation needs a judge for at least one principal: name them by "
                "evaluation.objectives, {principal: judge}"
            )
        return self

    @model_validator(mode="after")
    def _comparison_fits(self) -> EvaluateConfig:
        reference = self.evaluation.reference_point
        if reference is not None and set(reference) != set(self.objectives):
            raise ValueError(
                f"evaluation.reference_point must name every objective once ({_listed(self.objectives)}); "
                f"got {_listed(reference)}"
            )
        if self.input.weights is not None:
            raise ValueError("an evaluation compares weights of the grid: give grid.weights, not input.weights")
        return self


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
