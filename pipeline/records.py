"""Input rows and output records of the decoder: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, Any]  # OpenAI shape: {"role": ..., "content": ...}; calls of tools in "tool_calls"
Tool = dict[str, Any]  # OpenAI shape: {"type": "function", "function": {"name": ..., ...}}


# All columns that a run's output may have, in the order of `pipeline.storage.tables.output_schema`.
OUTPUT_COLUMNS = (
    "row_id",
    "sample",
    "variant",
    "rule",
    "agent_temperature",
    "game_unit",
    "draw_temperature",
    "prompt",
    "completion",
    "messages",
    "tools",
    "response",
    "reasoning",
    "finish_reason",
    "num_tokens",
    "num_reasoning_tokens",
    "weights",
    "rewards",
    "payments",
    "kl_per_token",
    "covered_mass",
    "max_residual",
    "num_unsolved",
    "solver_steps",
    "error",
    "original_response",
    "original_rewards",
    "chosen",
    "rejected",
    "proposals",
    "tokens",
)


# What the files of failed rows have besides.
FAILED_COLUMNS = ("input_file", "input_row", "given")


def is_reserved(name: str) -> bool:
    """Whether the output has a column of this name; many readers do not distinguish upper and lower case."""
    return name.casefold() in (*OUTPUT_COLUMNS, *FAILED_COLUMNS)


class FinishReason(StrEnum):
    """Why an answer ended: at an end token or a stop string, at its length limit, in its reasoning, or by an error.

    What ended within its reasoning, at an end token or its limit, has no answer: its text is empty.
    """

    STOP = "stop"
    LENGTH = "length"
    REASONING = "reasoning"
    ERROR = "error"

    @property
    def words(self) -> str:
        """What happened, for people."""
        return {
            self.STOP: "ended",
            self.LENGTH: "cut at max_new_tokens",
            self.REASONING: "ended in its reasoning, without an answer",
            self.ERROR: "failed",
        }[self]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that a row brings for its game.

    Args:
        text: of the answer.
        weight: in the base policy, relative to the row's others.
    """

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One input row. A row that could not be read carries `error` and is not decoded.

    It then has what of it could be read: messages, existing answer and weights, None where one is no number.

    Args:
        row_id: identifies the row; it keys the draws.
        messages: the conversation so far.
        weights: the row's own preference weights by principal; principals that are left out keep the configured ones.
        response: an existing answer to compare with.
        error: why the row could not be read.
        max_new_tokens: the row's own limit, which takes effect where it is below the configured one.
        seed: of the row's draws, in place of the run's.
        stop: strings that end the row's answer, in place of the configured ones.
        not_obeyed: parameters of the row's request that have no effect, by name.
        tools: what the model may call.
        template_kwargs: what the row's chat templates read besides the messages, in place of the base's, key by key.
        wished_kwargs: like them, and without effect where no template reads them.
        num_names: messages whose speaker has a name, which is dropped.
        num_reasoning: messages with reasoning in a field of its own, which is not read.
        is_json_prompt: whether its prompt was the JSON text of the messages.
        file: the name of the file that it is from; empty where it is from no file.
        number: its line or element, from 1, or its row in a table, from 0: as messages count.
        given: of a row that could not be read, the values of its columns as JSON text, or the line.
        candidates: answers that its game is about, in place of some that the base draws.
    """

    row_id: str
    messages: tuple[Message, ...] = ()
    weights: Mapping[str, float | None] | None = None
    response: str | None = None
    error: str | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    not_obeyed: tuple[tuple[str, Any], ...] = ()
    tools: tuple[Tool, ...] = ()
    num_names: int = 0
    num_reasoning: int = 0
    is_json_prompt: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    file: str = ""
    number: int | None = None
    given: str | None = None
    wished_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One drawn token.

    Args:
        token_id: of the token.
        text: the token as text.
        base_logprob: log-probability under the base, in nats; None where it was not drawn, but closes reasoning.
        logprob: log-probability under the policy that drew it, in nats; None likewise.
        payments: by principal, nats paid for the token; None under a rule without payments.
        thresholds: by principal, the value in nats above which it pays; None under a rule without payments.
    """

    token_id: int
    text: str
    base_logprob: float | None
    logprob: float | None
    payments: Mapping[str, float | None]
    thresholds: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A block or an answer that a game was about.

    Args:
        game: the number of the game in its answer.
        text: of the block, or of the answer.
        count: how often the base drew it.
        probability: under the policy that the game led to.
        is_chosen: whether it was drawn.
        rewards: by principal, in nats, before weights; None where it gives no score, and the game was without it.
    """

    game: int
    text: str
    count: int
    probability: float
    is_chosen: bool
    rewards: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Record:
    """One output row. Numbers are float64 sums or means over the answer's tokens.

    Args:
        row_id: of the input row.
        sample: which of the row's samples this is.
        prompt: the input's messages.
        response: the answer; None where there is an error.
        finish_reason: why the answer ended.
        num_tokens: tokens drawn, the end token included.
        weights: preference weights by principal; None where a failed row has one that is no number.
        rewards: by principal, the sum of q over the answer in nats, before weights.
        payments: by principal, nats paid for the answer's tokens; None under a rule without payments.
        kl_per_token: KL divergence of the policy to the base, in nats per token; None without a trace.
        covered_mass: mean base probability of the candidates; None without a trace.
        max_residual: largest residual of the answer's games; None without a trace.
        num_unsolved: tokens whose game did not converge.
        solver_steps: mean number of solver steps per token; None without a trace.
        error: why there is no answer.
        variant: which of the run's variants this is.
        rule: of the variant.
        agent_temperature: of the variant.
        unit: what its games are about.
        temperature: of the variant's draws.
        original_response: the existing answer that the row came with.
        original_rewards: its rewards by principal, in nats.
        chosen: the answer with the higher weighted reward, of the new and the existing one.
        rejected: the other one.
        tokens: every drawn token, with trace "tokens".
        tools: what the model could call.
        reasoning: what the model wrote before the answer; None where it wrote none.
        num_reasoning_tokens: tokens drawn before the answer, markers included.
        proposals: what the games over blocks or answers were about.
        values: by principal, its lowest and highest q over the drawn tokens, in nats; not a column of the output.
        num_passes: passes of the base that gave it tokens; likewise, and it says nothing about the answer.
        file, number, given: of the input row, where there is an error.
    """

    row_id: str
    sample: int
    prompt: tuple[Message, ...]
    response: str | None
    finish_reason: FinishReason
    num_tokens: int
    weights: Mapping[str, float | None]
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
    unit: str = "token"
    temperature: float | None = None
    original_response: str | None = None
    original_rewards: Mapping[str, float | None] | None = None
    chosen: str | None = None
    rejected: str | None = None
    tokens: tuple[TokenTrace, ...] = field(default=())
    tools: tuple[Tool, ...] = ()
    reasoning: str | None = None
    num_reasoning_tokens: int = 0
    proposals: tuple[Proposal, ...] = ()
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    num_passes: int = field(default=0, compare=False)
    file: str = ""
    number: int | None = None
    given: str | None = None

    @property
    def is_failed(self) -> bool:
        """Whether it has an error instead of an answer."""
        return self.error is not None
