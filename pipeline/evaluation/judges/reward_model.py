"""The judge that is a reward model: its section, and the checks that need no weights."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.interface import Judge, JudgeConfig, JudgeContext
from pipeline.hub.chat_templates import PromptTemplate, end_of_turn, plan_whole
from pipeline.hub.model_facts import read_model_facts
from pipeline.hub.reward_heads import CLASSIFIER, choose_output, read_head
from pipeline.hub.sources import Location
from pipeline.hub.tokenizer_facts import TokenizerFacts, facts_of_tokenizer, read_tokenizer_facts
from pipeline.principals.section import Label
from pipeline.sections import ModelConfig, model_from_name, on_one_device

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource

# where the model comes from and runs, and what plans reckon with; its identity stands for the first two
NOT_IN_IDENTITY = ("model", "revision", "resources", "device", "tensor_parallel", "pipeline_parallel", "sizes")


def settings_in_identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """What of a judge's model section decides a score; without a quantization of null, so that scores stay valid that
    were made before there was the key."""
    kept = {key: value for key, value in model.items() if key not in NOT_IN_IDENTITY}
    if kept.get("quantization") is None:
        kept.pop("quantization", None)
    return kept


class RewardModelJudge(JudgeConfig):
    """A reward model with any common head: the output `label` at the last token of conversation and answer.

    A model that was trained at the end of a text, as safe-rlhf's are, is read there. Encoders pool as they do.
    """

    kind: Literal["reward_model"]
    model: Annotated[ModelConfig, BeforeValidator(model_from_name), AfterValidator(on_one_device)]
    label: Label = Field(
        None, description="which of the model's outputs is the score, by its number or name, where it has several"
    )
    chat_template: str | None = Field(None, description="Jinja chat template instead of the tokenizer's own")
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="what the chat template reads besides messages"
    )
    chat_template_time: datetime | None = Field(
        None, description="the time that the chat template is given, where it asks for one"
    )
    batch_size: int = Field(8, ge=1, le=1024, description="most texts in one forward pass")
    max_tokens: int | None = Field(None, ge=1, description="longest text in tokens; null: the model's context")

    @property
    def reads_prompts(self) -> bool:
        return True

    @property
    def required_model(self) -> ModelConfig:
        return self.model

    def check(self, context: JudgeContext) -> None:
        assert context.source is not None
        facts = read_model_facts(context.source)
        head = read_head(context.source)
        place = f"judge {context.name}"
        is_classifier = any(each.endswith(CLASSIFIER) for each in facts.architectures)
        if head is not None and not (is_classifier and head.weights == {"score.weight"}):
            choose_output(self.label, head.names, place)
        elif is_classifier:
            choose_output(self.label, [facts.label_names[at] for at in sorted(facts.label_names)], place)
        elif context.source.location not in (Location.HUB, Location.REMOTE):  # else its weights are not here yet
            raise ConfigurationError(
                f"{place}: {context.source.name} is {', '.join(facts.architectures) or 'of no stated architecture'}; "
                "a reward model is a sequence-classification model, or has a head that gives scores"
            )

        self._plan_template(context, read_tokenizer_facts(context.source))

    def _plan_template(self, context: JudgeContext, tokenizer: TokenizerFacts) -> PromptTemplate:
        """How conversations are written. Raises ConfigurationError where a setting has no effect."""
        place, text = f"judge {context.name}", self.chat_template or tokenizer.chat_template
        if text is not None:
            kwargs = self.chat_template_kwargs
            return plan_whole(place, text, kwargs, self.chat_template_time, tokenizer.named_tokens)
        if self.chat_template_kwargs or self.chat_template_time:
            raise ConfigurationError(
                f"{place}: the model has no chat template, so chat_template_kwargs and "
                "chat_template_time have no effect"
            )
        return PromptTemplate(None)

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        assert source is not None
        described = {**super().identity(source), "identity": source.identity}
        described["model"] = settings_in_identity(described["model"])
        del described["batch_size"]  # a text's score does not depend on its batch
        described["conversations"] = "as prompts, to the end of the turn"
        if self.chat_template is None and read_tokenizer_facts(source).chat_template is None:
            described["conversations"] = "as pairs, with their segments"
        return described

    def load(self, context: JudgeContext) -> Judge:
        # torch: seconds
        from pipeline.evaluation.judges.conversations import JudgedConversations
        from pipeline.evaluation.judges.sequence_classifier import SequenceClassifier, load_judge_model, longest_text

        assert context.source is not None
        found, tokenizer = load_judge_model(context.name, context.source, context.cache_folder, self.model)
        facts = facts_of_tokenizer(tokenizer)
        template = self._plan_template(context, facts)
        variables = {**facts.named_tokens, **template.variables}
        end_id = None
        if template.text is not None:
            end_id = end_of_turn(template.text, variables, facts.special_tokens)
        limits = [limit for limit in (self.max_tokens, longest_text(found.model)) if limit is not None]
        return SequenceClassifier(
            found,
            pad_id=tokenizer.pad_token_id or 0,
            label=choose_output(self.label, found.names, f"judge {context.name}"),
            factor=self.factor,
            conversations=JudgedConversations(tokenizer, template, frozenset(facts.special_tokens), end_id),
            batch_size=self.batch_size,
            max_tokens=min(limits, default=None),
            end_id=tokenizer.eos_token_id if found.ends else None,
        )
