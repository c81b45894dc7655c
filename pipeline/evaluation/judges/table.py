"""The table of judge kinds. The package's docstring says how to add one."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from pipeline.evaluation.judges.function import FunctionJudge, section_of_function
from pipeline.evaluation.judges.llm import LlmJudge
from pipeline.evaluation.judges.principal import PrincipalJudge
from pipeline.evaluation.judges.profanity import ProfanityJudge
from pipeline.evaluation.judges.reward_model import RewardModelJudge
from pipeline.evaluation.judges.sentiment import SentimentJudge
from pipeline.evaluation.judges.words import BrevityJudge, DistinctJudge, LengthJudge, RepetitionJudge

AnyJudge = Annotated[
    SentimentJudge
    | ProfanityJudge
    | LengthJudge
    | BrevityJudge
    | DistinctJudge
    | RepetitionJudge
    | PrincipalJudge
    | RewardModelJudge
    | LlmJudge
    | FunctionJudge,
    Field(discriminator="kind"),
    BeforeValidator(section_of_function),
]
