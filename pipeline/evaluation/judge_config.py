"""The sections of a configuration that describe judges, one class a kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.config.sections import ModelConfig, Section, model_from_name

Sign = Literal["higher", "lower"]


class JudgeConfig(Section):
    """What every judge has. Its score is the quantity that it measures times `scale`; `sign: lower` says that less
    is better and negates it, so that a higher score is always better."""

    sign: Sign = "higher"
    scale: float = Field(1.0, gt=0)


class SentimentJudge(JudgeConfig):
    """The compound sentiment of the text by VADER's word list, from -1 to 1."""

    kind: Literal["sentiment"]


class ProfanityJudge(JudgeConfig):
    """The share of profane words by a word list, from 0 to 1."""

    kind: Literal["profanity"]
    sign: Sign = "lower"


class LengthJudge(JudgeConfig):
    """The number of words, or of tokens drawn."""

    kind: Literal["length"]
    unit: Literal["words", "tokens"] = "words"


class BrevityJudge(JudgeConfig):
    """1 / (1 + words / half_words): nearly 1 for one word, 1/2 at `half_words`; an empty answer has 0."""

    kind: Literal["brevity"]
    half_words: float = Field(20.0, gt=0)


class DistinctJudge(JudgeConfig):
    """distinct-n: the share of the answer's n-grams of words that are different ones, from 0 to 1."""

    kind: Literal["distinct"]
    n: int = Field(2, ge=1, le=16)


class RepetitionJudge(JudgeConfig):
    """The share of words that lie in an n-gram which stood in the answer before, from 0 to 1."""

    kind: Literal["repetition"]
    n: int = Field(3, ge=1, le=16)
    sign: Sign = "lower"


class PrincipalJudge(JudgeConfig):
    """A principal's own reward: the sum of its q over the answer in nats, by token or in all.

    It is what the rules were told to raise, so it shows how well they do that, and not whether that is any good.
    """

    kind: Literal["principal"]
    principal: str = Field(min_length=1)
    per: Literal["token", "answer"] = "token"


class RewardModelJudge(JudgeConfig):
    """A sequence-classification model: the logit `label` at the last token of conversation and answer."""

    kind: Literal["reward_model"]
    model: Annotated[ModelConfig, BeforeValidator(model_from_name)]
    label: int = Field(0, ge=0, description="which of the model's outputs is the score")
    chat_template: str | None = Field(None, description="Jinja chat template instead of the tokenizer's own")
    batch_size: int = Field(8, ge=1, le=1024)
    max_tokens: int | None = Field(None, ge=1, description="longest text in tokens; null: the model's context")


AnyJudge = Annotated[
    SentimentJudge
    | ProfanityJudge
    | LengthJudge
    | BrevityJudge
    | DistinctJudge
    | RepetitionJudge
    | PrincipalJudge
    | RewardModelJudge,
    Field(discriminator="kind"),
]
