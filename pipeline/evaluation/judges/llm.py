"""The judge that is a chat model with a rubric: one of this machine, or behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.interface import Judge, JudgeConfig, JudgeContext, JudgedAnswer
from pipeline.evaluation.judges.reward_model import settings_in_identity
from pipeline.records import Message
from pipeline.sections import ModelConfig, Section, model_from_name, on_one_device

if TYPE_CHECKING:
    from pipeline.hub.sources import ModelSource

# of an endpoint: how it is asked, not what
NOT_IN_ENDPOINT_IDENTITY = ("api_key_env", "timeout_s", "attempts", "concurrency", "max_requests")
INSTRUCTIONS = (
    "You judge the last answer of a conversation by a rubric. Reply with a whole number from {low} to {high} and "
    "nothing else."
)


class EndpointConfig(Section):
    """A server that speaks OpenAI's chat completions."""

    url: str = Field(pattern=r"^https?://\S+$", description="up to /v1, such as http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="what the server calls the model")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="environment variable with the key; null: none is sent"
    )
    timeout_s: float = Field(60.0, gt=0, description="of one request")
    attempts: int = Field(4, ge=1, le=20, description="for requests that time out, are refused for now or fail there")
    concurrency: int = Field(8, ge=1, le=256, description="requests at once")
    max_requests: int | None = Field(
        None, ge=0, description="budget of this process; answers beyond it have no score until the next run"
    )

    @field_validator("url")
    @classmethod
    def _has_no_credentials(cls, url: str) -> str:
        if "@" in url.partition("://")[2].partition("/")[0]:  # messages and stored configurations have it in them
            raise ValueError("must not hold a user or a password; name the variable of the key in api_key_env")
        return url


class LlmJudge(JudgeConfig):
    """A chat model that reads conversation, answer and `rubric`, and gives a whole number from `low` to `high`.

    With `model` the number is chosen among the allowed ones by the model's probabilities: their mean (`reads: mean`)
    or the likeliest one. With `endpoint` the reply is constrained by a JSON schema where the server can do that; a
    reply without such a number gives no score. Replies are kept, so that nothing is asked twice.
    """

    kind: Literal["llm"]
    rubric: str = Field(min_length=1, description="what is judged, and what the numbers mean")
    low: int = Field(1, ge=-100, le=100, description="the worst score")
    high: int = Field(5, ge=-100, le=100, description="the best score")
    model: Annotated[
        Annotated[ModelConfig, AfterValidator(on_one_device)] | None,
        BeforeValidator(model_from_name),
        Field(description="a chat model of this machine"),
    ] = None
    endpoint: EndpointConfig | None = None
    reads: Literal["mean", "likeliest"] = Field(
        "mean", description="how a model's probabilities of the numbers become a score"
    )

    @model_validator(mode="after")
    def _complete(self) -> LlmJudge:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("kind llm needs a model or an endpoint, and not both")
        if self.low >= self.high:
            raise ValueError(f"low must be below high; got {self.low} and {self.high}")
        if self.endpoint is not None and self.reads != "mean":
            raise ValueError("reads has no effect with an endpoint, which replies with one number")
        return self

    @property
    def reads_prompts(self) -> bool:
        return True

    @property
    def required_model(self) -> ModelConfig | None:
        return self.model

    def check(self, context: JudgeContext) -> None:
        if self.endpoint is not None:
            self._key(context)

    def identity(self, source: ModelSource | None) -> dict[str, Any]:
        described = {**super().identity(source), "conversations": "with calls of tools"}
        if source is not None:
            described["identity"] = source.identity
            described["model"] = settings_in_identity(described["model"])
        else:
            endpoint = described["endpoint"]
            described["endpoint"] = {
                key: each for key, each in endpoint.items() if key not in NOT_IN_ENDPOINT_IDENTITY
            }
        return described

    def load(self, context: JudgeContext) -> Judge:
        if self.endpoint is not None:
            from pipeline.evaluation.judges.endpoint import EndpointJudge  # requests

            return EndpointJudge(context.name, self, self.endpoint, context.cache_folder, self._key(context))
        from pipeline.evaluation.judges.chat_model import load_chat_judge  # torch: seconds

        assert context.source is not None
        assert self.model is not None
        return load_chat_judge(context, self, self.model)

    def messages(self, answer: JudgedAnswer) -> list[Message]:
        """What the model is asked."""
        instructions = INSTRUCTIONS.format(low=self.low, high=self.high)
        asked = (
            f"Rubric: {self.rubric}\n\nThe conversation:\n{conversation(answer.prompt)}\n\n"
            f"The answer to judge:\n{answer.text}\n\nThe number from {self.low} to {self.high}:"
        )
        return [{"role": "system", "content": instructions}, {"role": "user", "content": asked}]

    def _key(self, context: JudgeContext) -> str | None:
        """The endpoint's key, from the environment of the process that asks: it is never written anywhere."""
        assert self.endpoint is not None
        name = self.endpoint.api_key_env
        if name is None:
            return None
        if not os.environ.get(name):
            raise ConfigurationError(f"judge {context.name}.endpoint.api_key_env: the environment has no {name}")
        return os.environ[name]


def conversation(messages: Sequence[Message]) -> str:
    """A conversation as plain text, with the calls of tools that it has."""
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def _said(message: Message) -> str:
    lines = [str(message["content"])]
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        lines.append(f"{call['function']['name']}({text})")
    return "\n".join(filter(None, lines))
