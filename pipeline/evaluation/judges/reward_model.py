"""The judge that is a reward model: its section, and the checks that need no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.interface import Judge, JudgeConfig, JudgeContext
from pipeline.hub.model_facts import context_length, read_model_facts
from pipeline.sections import ModelConfig, model_from_name

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource

# where the model comes from and runs; its identity stands for the first two
NOT_IN_IDENTITY = ("model", "revision", "resources", "device")


class RewardModelJudge(JudgeConfig):
    """A sequence-classification model: the logit `label` at the last token of conversation and answer."""

    kind: Literal["reward_model"]
    model: Annotated[ModelConfig, BeforeValidator(model_from_name)]
    label: int = Field(0, ge=0, description="which of the model's outputs is the score")
    chat_template: str | None = Field(None, description="Jinja chat template instead of the tokenizer's own")
    batch_size: int = Field(8, ge=1, le=1024)
    max_tokens: int | None = Field(None, ge=1, description="longest text in tokens; null: the model's context")

    @property
    def required_model(self) -> ModelConfig:
        return self.model

    def check(self, context: JudgeContext) -> None:
        assert context.source is not None
        facts = read_model_facts(context.source)
        architectures = facts.architectures
        if not any(each.endswith(("ForSequenceClassification", "RewardModel")) for each in architectures):
            raise ConfigurationError(
                f"judge {context.name}: {context.source.name} is "
                f"{', '.join(architectures) or 'of no stated architecture'}; "
                "a reward model is a sequence-classification model"
            )
        if self.label >= facts.num_labels:
            raise ConfigurationError(
                f"judge {context.name}: label must be below {facts.num_labels}, the number of outputs of "
                f"{context.source.name}; got {self.label}"
            )

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        assert source is not None
        described = {**super().identity(source), "identity": source.identity}
        described["model"] = {key: each for key, each in described["model"].items() if key not in NOT_IN_IDENTITY}
        del described["batch_size"]  # a text's score does not depend on its batch
        return described

    def load(self, context: JudgeContext) -> Judge:
        from pipeline.evaluation.judges.sequence_classifier import (
            SequenceClassifier,
            load_classifier,
        )  # torch: seconds

        assert context.source is not None
        model, tokenizer = load_classifier(context.name, context.source, context.cache_folder, self.model)
        limits = [limit for limit in (self.max_tokens, context_length(model.config)) if limit is not None]
        return SequenceClassifier(
            model,
            tokenizer,
            label=self.label,
            factor=self.factor,
            chat_template=self.chat_template,
            batch_size=self.batch_size,
            max_tokens=min(limits, default=None),
        )
