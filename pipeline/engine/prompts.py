"""Encodes a row's messages into the token ids that each role reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.sections import ThinkingConfig
from pipeline.engine.placement import place
from pipeline.engine.prompter import NOTHING
from pipeline.engine.reasoning import (
    OPENING_TOKENS,
    Phase,
    ReasoningControl,
    ReasoningTrack,
    phase_of_prefill,
    phase_of_prompt,
)
from pipeline.engine.special_text import TextEncoder
from pipeline.engine.tool_check import check_tools_written
from pipeline.errors import RowError
from pipeline.hub.answer_starts import answers_follow_directly
from pipeline.hub.chat_templates import ANSWER_PROBE, RESERVED, PromptTemplate, variables_of
from pipeline.hub.reasoning import ReasoningFormat
from pipeline.hub.template_limits import limited
from pipeline.protocol.topology import BASE, Role, Topology
from pipeline.records import Message, Row, Tool

PREFIXES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class HostText:
    """What is known of the text that a host's model reads.

    Args:
        tokenizer: of transformers.
        context_length: in tokens; None where the model states none.
        vocab_size: tokens that the model's embedding has.
        special_tokens: tokens that are no text, as text.
    """

    tokenizer: Any
    context_length: int | None
    vocab_size: int
    special_tokens: frozenset[str] = frozenset()


class ChatPrompter:
    """Renders conversations by the chat template of each role and encodes them.

    Args:
        topology: the roles.
        hosts: by host name; all tokenizers hold the same vocabulary, but for those of reward models.
        templates: how prompts are written, by role.
        stop_ids: token ids that end an answer.
        end_id: the token that follows a finished answer; None where there is none.
        answer_vocab_size: tokens that all models know which read answers token by token.
        allow_special_tokens: whether special tokens in messages and answers are read as tokens, not as text.
        reasoning: how the base marks its reasoning; None where it does not reason.
        thinking: how reasoning is treated; None: by the defaults.
    """

    def __init__(
        self,
        topology: Topology,
        hosts: Mapping[str, HostText],
        templates: Mapping[str, PromptTemplate],
        stop_ids: frozenset[int],
        end_id: int | None,
        answer_vocab_size: int,
        *,
        allow_special_tokens: bool = False,
        reasoning: ReasoningFormat | None = None,
        thinking: ThinkingConfig | None = None,
    ) -> None:
        self._roles = topology.roles
        self._hosts = hosts
        self._templates = templates
        self._base = hosts[BASE].tokenizer
        self._prefixes: dict[tuple[str, str | None], list[int]] = {}
        self._stop_ids = stop_ids
        self._end_id = end_id
        self._answer_vocab_size = answer_vocab_size
        none = frozenset[str]()
        self._encoders = {
            name: TextEncoder(host.tokenizer, none if allow_special_tokens else host.special_tokens)
            for name, host in hosts.items()
        }
        self._follows = answers_follow_directly(self._base, templates[BASE], topology.weights)
        self._control: ReasoningControl | None = None
        if reasoning is not None:
            closing = self._ids(reasoning.end + reasoning.resume)
            how = thinking or ThinkingConfig()
            ends_turns = closing[0] in stop_ids
            self._control = ReasoningControl(reasoning, tuple(closing), how.steer, how.max_tokens, ends_turns)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self._stop_ids

    def encode(
        self,
        messages: Sequence[Message],
        weights: Mapping[str, float],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> dict[str, list[int]]:
        """Token ids of the prompt by role name; `weights` are in scope of the templates of roles that take them.

        `template_kwargs` take the place of the base's, key by key, in all roles that have them from the base.

        Raises:
            RowError: a template refuses the messages, or a prompt is empty, is longer than its role's context, or has
                a token that the role's model does not know; no template reads what is given.
        """
        if template_kwargs:
            self._check_kwargs(template_kwargs)
        prompts = {
            name: self._encode_role(role, messages, weights, tools, template_kwargs)
            for name, role in self._roles.items()
        }
        for name, ids in prompts.items():
            host = self._hosts[self._roles[name].host]
            limit = host.context_length
            if not ids:
                raise RowError(f"the prompt has no tokens for {name}")
            if (largest := max(ids)) >= host.vocab_size:
                token = host.tokenizer.convert_ids_to_tokens(largest)
                raise RowError(
                    f"the prompt has the token {token!r} ({largest}), and the model of {name} has embeddings for "
                    f"{host.vocab_size} tokens only"
                )
            if limit is not None and len(ids) >= limit:
                raise RowError(
                    f"the prompt has {len(ids)} tokens for {name}, whose context holds {limit} with the answer"
                )
        return prompts

    def shared_prefixes(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """By role, how many first tokens the prompt has in common with every other prompt of its system message.

        None are shared by a role whose template reads the row's weights: other rows have others.
        """
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        return {
            name: 0 if self._roles[name].takes_weights else _num_common(self._prefix(self._roles[name], system), ids)
            for name, ids in prompts.items()
        }

    def _prefix(self, role: Role, system: str | None) -> list[int]:
        """The tokens that all prompts with this system message begin with: the common prefix of two short prompts.

        Their texts are a letter and a digit, so that a token that reaches into the text differs between them.
        """
        key = (role.name, system)
        if key not in self._prefixes:
            before = [] if system is None else [{"role": "system", "content": system}]
            try:
                first, second = (
                    self._encode_role(role, [*before, {"role": "user", "content": text}], {}) for text in ("a", "1")
                )
            except RowError:
                first = second = []
            if len(self._prefixes) >= PREFIXES_KEPT:
                self._prefixes.clear()
            self._prefixes[key] = first[: _num_common(first, second)]
        return self._prefixes[key]

    def context_left(self, prompts: Mapping[str, Sequence[int]]) -> int | None:
        """Tokens that fit after the prompt in every role's context; None: no limit."""
        left = [
            limit - len(ids)
            for name, ids in prompts.items()
            if (limit := self._hosts[self._roles[name].host].context_length) is not None
        ]
        return min(left, default=None)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an existing answer, with the end of a turn as a finished answer has.

        Raises:
            RowError: it has a token that some model of the run does not know.
        """
        ids = self._encoders[BASE].encode_text(text, follows=self._follows)
        if (largest := max(ids, default=0)) >= self._answer_vocab_size:
            token = self._base.convert_ids_to_tokens(largest)
            raise RowError(
                f"the existing answer has the token {token!r} ({largest}), and the models of the run know "
                f"{self._answer_vocab_size} tokens only"
            )
        return [*ids, self._end_id] if self._end_id is not None else ids

    def encode_existing(self, row: Row, prompts: Mapping[str, Sequence[int]]) -> tuple[list[int], int]:
        """Token ids that follow the prompts of a row for its existing answer, and how many come before the answer.

        Reasoning in the answer's text is read with its markers as tokens. An answer without any follows what the
        template writes before such an answer, an empty block or the header of a channel.

        Raises:
            RowError: it has a token that some model of the run does not know.
        """
        assert row.response is not None
        if self._control is None:
            return self.encode_answer(row.response), 0
        form = self._control.form
        is_open = self._phase(row.messages, prompts) is Phase.REASONING
        reasoning, answer = form.split(row.response)
        if reasoning is None:
            before = self._ids(self._written_before_answer(row, is_open=is_open))
            return [*before, *self.encode_answer(row.response)], len(before)
        start = [] if is_open else self._ids(f"{form.start}\n")
        before = [*start, *self._encoders[BASE].encode_text(f"{reasoning}\n"), *self._ids(f"{form.end}\n\n")]
        return [*before, *self.encode_answer(answer)], len(before)

    def begin_turn(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> ReasoningTrack | None:
        """What follows the reasoning in an answer to these prompts; None where the base does not reason."""
        if self._control is None:
            return None
        return ReasoningTrack(self._control, self, self._phase(messages, prompts))

    def without_reasoning(self, text: str) -> str:
        """An answer's text without the block of reasoning that it may begin with."""
        return text if self._control is None else self._control.form.split(text)[1]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer without special tokens."""
        return str(self._base.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def left_out(self, ids: Sequence[int]) -> str:
        """What `decode` leaves out at the start: a space, where SentencePiece's tokenizers begin a text."""
        alone, behind = self.decode(ids), self.decode([*self._ids("a"), *ids])
        return behind[1 : len(behind) - len(alone)] if behind.startswith("a") and behind.endswith(alone) else ""

    def raw_text(self, ids: Sequence[int]) -> str:
        """Text of tokens with special ones by name."""
        return str(self._base.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones by name."""
        return str(self._base.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _phase(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> Phase:
        """Where in a turn the answer to these prompts begins."""
        assert self._control is not None
        if messages and messages[-1]["role"] == "assistant":
            return phase_of_prefill(self._control.form, messages[-1]["content"])
        return phase_of_prompt(self._control.form, self.raw_text(prompts[BASE][-OPENING_TOKENS:]))

    def _written_before_answer(self, row: Row, *, is_open: bool) -> str:
        """What the base's template writes between the prompt and an answer without reasoning."""
        assert self._control is not None
        end = f"\n{self._control.form.end}\n\n" if is_open else ""
        role, messages = self._roles[BASE], place(row.messages, None, self._templates[BASE])
        if self._templates[BASE].text is None:
            return end
        try:
            prompt = self._render(role, messages, {}, row.tools, self.kwargs_of(row))
            answer = {"role": "assistant", "content": ANSWER_PROBE}
            whole = self._render(role, [*messages, answer], {}, row.tools, self.kwargs_of(row), continues=False)
        except RowError:
            return end
        if not whole.startswith(prompt) or ANSWER_PROBE not in whole:
            return end
        return whole[len(prompt) :].rpartition(ANSWER_PROBE)[0]

    def _ids(self, text: str) -> list[int]:
        """Tokens of text that the run itself writes, special ones included."""
        return list(self._base(text, add_special_tokens=False)["input_ids"])

    def kwargs_of(self, row: Row) -> dict[str, Any]:
        """What the row gives its chat templates, without wishes that none of them reads."""
        wished = row.wished_kwargs
        known = self._known_kwargs() if wished else frozenset[str]()
        return {**{key: each for key, each in wished.items() if key in known}, **row.template_kwargs}

    def _known_kwargs(self) -> frozenset[str]:
        """The names that templates with values of the base and the rows take from outside."""
        texts = [self._templates[name].text for name, role in self._roles.items() if role.has_base_kwargs]
        return frozenset[str]().union(*(variables_of(text) for text in texts if text is not None)) - RESERVED

    def _check_kwargs(self, template_kwargs: Mapping[str, Any]) -> None:
        """Refuse what a row gives its templates where none of them reads it. Raises RowError."""
        known = self._known_kwargs()
        for name in template_kwargs:
            if name in RESERVED:
                raise RowError(f"chat_template_kwargs.{name} is set by the run itself and cannot be given")
            if name not in known:
                others = ", ".join(sorted(known)) or "nothing"
                raise RowError(
                    f"chat_template_kwargs.{name} has no effect: the chat template does not use it; it uses {others}"
                )

    def _encode_role(
        self,
        role: Role,
        messages: Sequence[Message],
        weights: Mapping[str, float],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> list[int]:
        encoder, template = self._encoders[role.host], self._templates[role.name]
        if template.text is None and tools:
            raise RowError("tools need a chat template, and the model has none: set base.chat_template")
        if template.text is None:
            return encoder.encode_text(_plain_text(messages, role.principle), starts=True)
        marked = encoder.mark(list(place(messages, role.principle, template)))

        def render(messages: Sequence[Message], tools: Sequence[Tool]) -> str:
            return self._render(role, messages, weights, tools, encoder.mark(dict(template_kwargs)))

        marked_tools = encoder.mark(list(tools))
        check_tools_written(render, marked, marked_tools, role.name)
        return encoder.encode_marked(render(marked, marked_tools))

    def _render(
        self,
        role: Role,
        messages: Sequence[Message],
        weights: Mapping[str, float],
        tools: Sequence[Tool],
        template_kwargs: Mapping[str, Any] = NOTHING,
        *,
        continues: bool | None = None,
    ) -> str:
        """The text of a conversation up to where the answer goes on.

        It `continues` the last message, by default where that is the assistant's; else a new turn begins after a
        message to answer, and none after an answer.
        """
        tokenizer, encoder = self._hosts[role.host].tokenizer, self._encoders[role.host]
        template = self._templates[role.name]
        is_answered = messages[-1]["role"] == "assistant"
        continues = is_answered if continues is None else continues
        own = {**template.variables, **(role.with_base_kwargs(template_kwargs) if template_kwargs else {})}
        try:
            text = limited(
                lambda: tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template.text,
                    tokenize=False,
                    add_generation_prompt=not is_answered,
                    continue_final_message=continues,
                    principle=encoder.mark(role.principle or ""),
                    **({"weights": dict(weights)} if role.takes_weights else {}),
                    **{**own, **({"tools": list(tools)} if tools else {})},
                )
            )
        except Exception as error:  # Jinja runs the template's own code: any error is the row's
            raise RowError(f"the chat template of {role.name} refused the messages: {error}") from error
        return str(text)


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two sequences begin with in common."""
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _plain_text(messages: Sequence[Message], principle: str | None) -> str:
    """The prompt of a model without a chat template: the text of its only message."""
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise RowError("a conversation needs a chat template, and the model has none: set base.chat_template")
    text = str(messages[0]["content"])
    return text if principle is None else f"{principle}\n\n{text}"
