"""What the engine asks of whatever turns messages into tokens and tokens into text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from pipeline.engine.reasoning import ReasoningTrack
from pipeline.records import Message, Row, Tool

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Prompter(Protocol):
    """What the engine needs to know of prompts and answers; of conversations `ChatPrompter` knows it."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""

    def encode(
        self,
        messages: Sequence[Message],
        weights: Mapping[str, float],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> Mapping[str, Sequence[int]]:
        """Token ids of the prompt by role name; `weights` are the row's, by principal, `tools` what it may call.

        `template_kwargs` are what the row gives its chat templates. Raises RowError where a role cannot read the
        prompt.
        """

    def shared_prefixes(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """By role, how many first tokens the prompt has in common with every other prompt of its system message."""

    def context_left(self, prompts: Mapping[str, Sequence[int]]) -> int | None:
        """Tokens that fit after the prompt in every role's context; None: no limit."""

    def encode_answer(self, text: str) -> Sequence[int]:
        """Token ids of an existing answer, with an end token as a finished answer has.

        Raises RowError where the models cannot read it.
        """

    def kwargs_of(self, row: Row) -> Mapping[str, Any]:
        """What the row gives its chat templates, without wishes that none of them reads."""

    def encode_existing(self, row: Row, prompts: Mapping[str, Sequence[int]]) -> tuple[Sequence[int], int]:
        """Token ids that follow the prompts of a row for its existing answer, and how many come before the answer.

        Before it come what the row has of reasoning, or what the template writes instead. Raises RowError.
        """

    def begin_turn(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> ReasoningTrack | None:
        """What follows the reasoning in an answer to these prompts; None where the base does not reason."""

    def without_reasoning(self, text: str) -> str:
        """An answer's text without the block of reasoning that it may begin with."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer without special tokens."""

    def left_out(self, ids: Sequence[int]) -> str:
        """What `decode` leaves out at the start of an answer, and what belongs there behind other text: a space."""

    def raw_text(self, ids: Sequence[int]) -> str:
        """Text of tokens with special ones by name."""

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones by name."""
