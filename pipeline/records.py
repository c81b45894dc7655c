"""What goes into the decoder and what comes out of it: plain data, one row at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, Any]  # OpenAI shape: {"role": ..., "content": ...}


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Row:
    """One input row. A row that could not be read carries `error` and nothing to decode.

    `weights` holds the row's own preference weights by principal (a subset is allowed; the others keep the
    configured ones); `response` an existing answer to compare with; `max_new_tokens` the row's own limit, where it is
    below the configured one.
    """

    row_id: str
    messages: tuple[Message, ...] = ()
    weights: Mapping[str, float] | None = None
    response: str | None = None
    error: str | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One drawn token: log-probabilities, what each principal paid for it, and the values above which each pays.

    All in nats; payments and thresholds are None under a rule without payments.
    """

    token_id: int
    text: str
    base_logprob: float
    logprob: float
    payments: Mapping[str, float | None]
    thresholds: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Record:
    """One output row. Numbers are float64 sums or means over the answer's tokens; rewards in nats.

    `variant` says which of the run's ways to answer this is, `rule` and `agent_temperature` what it decides by;
    `rewards` is the sum of q over the answer by principal, before weights; `payments` what each principal paid
    for the drawn tokens (None under a rule without payments). A rejected row has `error` and no answer.
    """

    row_id: str
    sample: int
    prompt: tuple[Message, ...]
    response: str | None
    finish_reason: FinishReason
    num_tokens: int
    weights: Mapping[str, float]
    rewards: Mapping[str, float | None]
    payments: Mapping[str, float | None]
    kl_per_token: float | None = None
    covered_mass: float | None = None
    max_residual: float | None = None
    num_unsolved: int = 0
    solver_steps: float | None = None
    error: str | None = None
    variant: int = 0
    rule: str = ""
    agent_temperature: float | None = None
    original_response: str | None = None
    original_rewards: Mapping[str, float | None] | None = None
    chosen: str | None = None
    rejected: str | None = None
    tokens: tuple[TokenTrace, ...] = field(default=())

    @property
    def is_rejected(self) -> bool:
        return self.error is not None
