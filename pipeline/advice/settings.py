"""The configuration of `cage advise`: a job, and how its rules are compared before it is run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cage.rule_names import RuleName
from pipeline.config.sections import Config, DecodingConfig, Finite, GridConfig
from pipeline.config.units import Unit
from pipeline.evaluation.config import BootstrapConfig
from pipeline.principals.kinds import Principal
from pipeline.sections import Section

MOST_CANDIDATES = 1024
COMPARABLE = tuple(
    rule for rule in RuleName if rule.uses_principals and rule.serves_tokens and not rule.at_weights
)  # on recorded games over tokens
VIEW = "-view"  # what a view's name ends with, after its principal's


class AdviseSection(Section):
    """What is recorded, and which rules are compared on it."""

    prompts: int = Field(50, ge=2, description="first prompts of the input that the base answers")
    views: dict[str, Principal] = Field(
        default_factory=dict,
        description="by principal: a second view of its objective, such as a paraphrase of its principle, or an "
        "adapter of another seed or other pairs; rules are steered by the principal and judged by the view",
    )
    rules: tuple[RuleName, ...] = Field(COMPARABLE, description="which are compared with linear")
    k: tuple[Finite, ...] = Field((0.0, 1.0, 2.0), description="thresholds of rule soft_threshold that are compared")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="nats per token at which rules are compared; null: decoding.target_kl, or what decoding.rule "
        "reaches at decoding.agent_temperature",
    )
    bootstrap: BootstrapConfig = BootstrapConfig()


class AdviseConfig(Config):
    """A job, and what `cage advise` does with it."""

    advise: AdviseSection = AdviseSection()

    @property
    def recording(self) -> Config:
        """The run that is recorded: the base answers, and all principals and views value its tokens."""
        views = {name + VIEW: section for name, section in self.advise.views.items()}
        given = self.decoding
        decoding = DecodingConfig(
            rule=RuleName.BASE,
            candidates=given.candidates,
            min_p=given.min_p,
            max_new_tokens=given.max_new_tokens,
            seed=given.seed,
            stop=given.stop,
            reproducibility=given.reproducibility,
            thinking=given.thinking,
        )
        fields = {name: getattr(self, name) for name in Config.model_fields}
        return Config(
            **{**fields, "principals": {**self.principals, **views}, "decoding": decoding, "grid": GridConfig()}
        )

    @property
    def recorded(self) -> dict[str, Any]:
        """What recorded games depend on, as plain values by dotted name."""
        job = self.recording.model_dump(mode="json", include={"input", "base", "principals", "decoding"})
        principals = job.pop("principals")
        found = {f"{section}.{key}": value for section, values in job.items() for key, value in values.items()}
        found["advise.prompts"] = self.advise.prompts
        # q is recorded before weights, unless a model reads them
        reads = any(
            each.takes_weights or getattr(each, "preference", "") == "weights" for each in self.principals.values()
        )
        for name, section in principals.items():
            kept = {key: value for key, value in section.items() if reads or key != "weight"}
            found[f"principals.{name}"] = kept
        return found

    @model_validator(mode="after")
    def _can_be_recorded(self) -> AdviseConfig:
        if not self.principals:
            raise ValueError("cage advise compares rules for principals, and there are none")
        if self.units != (Unit.TOKEN,):
            raise ValueError(f"cage advise looks at games over tokens; got unit: {', '.join(self.units)}")
        candidates = self.decoding.candidates
        if candidates == "all" or candidates > MOST_CANDIDATES:
            raise ValueError(f"cage advise needs decoding.candidates of at most {MOST_CANDIDATES}; got {candidates}")
        for name in self.advise.views:
            if name not in self.principals:
                known = ", ".join(self.principals)
                raise ValueError(f"advise.views names the unknown principal {name!r}; principals: {known}")
            if name + VIEW in self.principals:
                raise ValueError(f"the name {name + VIEW!r} is needed for a view; give that principal another one")
        return self

    @model_validator(mode="after")
    def _compares_rules(self) -> AdviseConfig:
        for rule in self.advise.rules:
            if rule not in COMPARABLE:
                raise ValueError(
                    f"advise.rules: {rule} cannot be compared on recorded games over tokens; choose among "
                    f"{', '.join(COMPARABLE)}"
                )
        for name, given in (("input.weights", self.input.weights), ("grid.weights", self.grid.weights)):
            if given:
                raise ValueError(
                    f"cage advise compares rules at one weight vector, that of the principals: {name} has no effect, "
                    "leave it out and give principals their weight"
                )
        if not any(weight > 0 for weight in self.weights.values()):
            raise ValueError("cage advise needs a principal whose weight is above 0; all are 0")
        return self
