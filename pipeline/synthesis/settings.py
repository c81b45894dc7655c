"""The configuration of `cage synthesize`: a run, and which training data to make from its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.sections import Config, as_list
from pipeline.config.variants import lay_out
from pipeline.evaluation.config import JUDGE_NAME, KEY_COLUMNS
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.sections import Section

REWARD, REWARD_PER_TOKEN = "reward", "reward_per_token"
NO_JUDGE = (REWARD, REWARD_PER_TOKEN, *KEY_COLUMNS)


class DataKind(StrEnum):
    """A kind of training data: conversations for supervised fine-tuning, or pairs for preference learning."""

    SFT = "sft"
    PREFERENCES = "preferences"


class PairSelection(StrEnum):
    """Which pairs are made: best against worst, or all with a sufficient margin."""

    BEST_WORST = "best_worst"
    ALL = "all"


class RangeConfig(Section):
    """The range in which a judge's score must lie, ends included."""

    min: float | None = Field(None, description="lowest score; null: any")
    max: float | None = Field(None, description="highest score; null: any")

    @model_validator(mode="after")
    def _says_something(self) -> RangeConfig:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min is above max: {self.min:g} and {self.max:g}")
        return self


class DuplicatesConfig(Section):
    """Which answers are dropped as duplicates of a kept one."""

    exact: bool = Field(True, description="drop an answer whose prompt and text were kept before")
    near: float | None = Field(
        None, ge=0.2, le=1, description="drop an answer this similar to a kept one: Jaccard of character 5-grams"
    )
    within: Literal["prompt", "dataset"] = Field("prompt", description="where to look for near duplicates")

    @model_validator(mode="after")
    def _looks_for_near_ones(self) -> DuplicatesConfig:
        if self.within != "prompt" and self.near is None:
            raise ValueError(
                "within: no effect without near; exact duplicates have the same prompt and answer, wherever they are"
            )
        return self


class FiltersConfig(Section):
    """What an answer must satisfy. The first filter that it fails is the reason that is counted."""

    finish_reasons: Annotated[tuple[Literal["stop", "length"], ...], BeforeValidator(as_list)] = Field(
        ("stop",), description="stop: it ended by itself; length: it was cut at max_new_tokens"
    )
    min_tokens: int = Field(1, ge=0, description="tokens drawn, the end token included")
    max_tokens: int | None = Field(None, ge=1, description="tokens drawn; null: any number")
    max_repetition: float | None = Field(
        None, ge=0, le=1, description="share of words in a 3-gram that occurred earlier in the answer"
    )
    min_rewards: dict[str, float] = Field(
        default_factory=dict, description="by principal: least sum of q over the answer, in nats, before weights"
    )
    min_rewards_per_token: dict[str, float] = Field(
        default_factory=dict, description="by principal: least mean of q per token, in nats, before weights"
    )
    judges: dict[str, RangeConfig] = Field(default_factory=dict, description="by judge: the scores to keep")
    duplicates: DuplicatesConfig = DuplicatesConfig()


class SftConfig(Section):
    """Data for supervised fine-tuning."""

    best: int | None = Field(None, ge=1, description="keep the best by score of each prompt and weight vector")


class PairsConfig(Section):
    """Preference pairs: two answers to one prompt under one weight vector, as preference depends on the weights."""

    select: PairSelection = Field(
        PairSelection.BEST_WORST, description="the best against the worst, or all with a sufficient margin"
    )
    max_pairs: int = Field(8, ge=1, description="with select: all, for each prompt and weight vector; widest first")
    min_margin: float = Field(0.0, ge=0, description="least difference of the scores; 0: any difference")
    weak_rejected: bool = Field(False, description="the rejected answer may fail the filters of rewards and judges")

    @model_validator(mode="after")
    def _has_several(self) -> PairsConfig:
        usual = type(self).model_fields["max_pairs"].default
        if self.select is PairSelection.BEST_WORST and self.max_pairs not in (1, usual):
            raise ValueError("max_pairs: no effect with select: best_worst, which makes one pair; say select: all")
        return self


class SynthesisConfig(Section):
    """Which training data to make from a run's answers. Nothing here changes the answers."""

    write: Annotated[tuple[DataKind, ...], BeforeValidator(as_list), Field(min_length=1)] = Field(
        tuple(DataKind), description="kinds of data: SFT conversations, preference pairs"
    )
    score: str = Field(
        REWARD, description="what ranks answers: reward (weighted, summed), reward_per_token, or a judge's name"
    )
    judges: dict[str, AnyJudge] = Field(default_factory=dict)
    filters: FiltersConfig = FiltersConfig()
    sft: SftConfig = SftConfig()
    pairs: PairsConfig = PairsConfig()
    validation: float = Field(0.05, ge=0, lt=1, description="share of prompts in the validation split")
    seed: int = Field(0, ge=0, lt=2**63, description="of the split")
    rows_per_file: int = Field(10_000, ge=1, le=1_000_000, description="rows in one file of the data set")
    licences: dict[str, str] = Field(
        default_factory=dict, description="licence of the input and of each model: input, base, principals.NAME.model"
    )

    @property
    def is_ranked(self) -> bool:
        """Whether anything ranks answers by score."""
        return DataKind.PREFERENCES in self.write or self.sft.best is not None

    def fields(self) -> dict[str, Any]:
        """Every setting by its dotted name, as plain values."""
        return dict(_flatten("synthesis", self.model_dump(mode="json")))

    @model_validator(mode="after")
    def _judges_known(self) -> SynthesisConfig:
        for name in self.judges:
            if not JUDGE_NAME.fullmatch(name) or name in NO_JUDGE:
                raise ValueError(
                    f"a judge's name has letters, digits, _ and -, starts with a letter and is none of "
                    f"{', '.join(NO_JUDGE)}; got {name!r}"
                )
        for name in self.filters.judges:
            _check_known(f"filters.judges.{name}", name, self.judges)
        _check_known("score", self.score, [REWARD, REWARD_PER_TOKEN, *self.judges])
        return self


class SynthesizeConfig(Config):
    """A run and the training data to make from it."""

    synthesis: SynthesisConfig = Field(default_factory=SynthesisConfig)

    @property
    def job(self) -> Config:
        """The run alone, as `cage relabel` would make it, so that other data can be made from it later."""
        # sections as they are: a default that is written out may be refused as one without effect
        return Config(**{name: getattr(self, name) for name in Config.model_fields})

    @model_validator(mode="after")
    def _names_known(self) -> SynthesizeConfig:
        synthesis = self.synthesis
        for key in ("min_rewards", "min_rewards_per_token"):
            for name in getattr(synthesis.filters, key):
                _check_known(f"synthesis.filters.{key}.{name}", name, self.principals)
        for name, judge in synthesis.judges.items():
            if judge.measured_principal is not None:
                _check_known(f"synthesis.judges.{name}.principal", judge.measured_principal, self.principals)
        return self

    @model_validator(mode="after")
    def _can_be_ranked(self) -> SynthesizeConfig:
        synthesis = self.synthesis
        if synthesis.is_ranked and synthesis.score in (REWARD, REWARD_PER_TOKEN) and not self.principals:
            raise ValueError(f"synthesis.score: {synthesis.score} needs principals, and there are none; name a judge")
        if DataKind.PREFERENCES not in synthesis.write:
            return self
        shared = Counter(repr(variant.weights) for variant in lay_out(self))
        if self.decoding.n * max(shared.values()) == 1:
            raise ValueError(
                "a preference pair takes two answers to one prompt under one weight vector, and there is one: "
                "set decoding.n to 2 or more, or synthesis.write to sft"
            )
        if self.decoding.temperature == 0 and max(shared.values()) == 1:
            raise ValueError(
                "decoding.temperature is 0, so that all answers to a prompt are equal and no pair can be made: "
                "raise it, or set synthesis.write to sft"
            )
        return self


def _flatten(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _flatten(f"{place}.{key}", child)
    else:
        yield place, value


def _check_known(where: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise ValueError(f"{where}: {name!r} is unknown; known: {', '.join(names) or 'none'}")
