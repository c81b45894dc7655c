"""The judge that reads off a principal's own reward."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from pipeline.evaluation.judges.interface import Judge, JudgeConfig, JudgeContext, JudgedAnswer, PerAnswerJudge


class PrincipalJudge(JudgeConfig):
    """A principal's own reward: the sum of its q over the answer in nats, or the mean per token.

    The rules optimise this quantity. So it shows how well they do that, and not whether the answers are any better;
    an evaluation notes that the judge is not independent.
    """

    kind: Literal["principal"]
    principal: str = Field(min_length=1, description="its name")
    per: Literal["token", "answer"] = Field(
        "token", description="the mean reward of a token, or the sum over the answer"
    )

    @property
    def measured_principal(self) -> str:
        return self.principal

    def load(self, context: JudgeContext) -> Judge:
        is_per_token = self.per == "token"
        return PerAnswerJudge(lambda answer: own_reward(answer, self.principal, per_token=is_per_token), self.factor)


def own_reward(answer: JudgedAnswer, principal: str, *, per_token: bool) -> float:
    """The sum of q over the answer in nats, or its mean per token; NaN where none was recorded."""
    reward = answer.rewards.get(principal)
    if reward is None or (per_token and not answer.num_tokens):
        return math.nan
    return reward / answer.num_tokens if per_token else reward
