"""Encodes a row's messages into the token ids that each role reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.engine.placement import place
from pipeline.engine.special_text import TextEncoder
from pipeline.engine.tool_check import check_tools_written
from pipeline.errors import RowError
from pipeline.hub.chat_templates import PromptTemplate
from pipeline.protocol.topology import BASE, Role, Topology
from pipeline.records import Message, Tool

PREFIXES_KEPT = 4096


class Prompter(Protocol):
    """What the engine needs to know of prompts and answers. `ChatPrompter` implements it for conversations."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""

    def encode(
        self, messages: Sequence[Message], weights: Mapping[str, float], tools: Sequence[Tool] = ()
    ) -> Mapping[str, Sequence[int]]:
        """Token ids of the prompt by role name; `weights` are the row's, by principal, `tools` what it may call.

        Raises RowError where a role cannot read the prompt.
        """

    def shared_prefixes(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """By role, how many first tokens the prompt has in common with every other prompt of its system message."""

    def context_left(self, prompts: Mapping[str, Sequence[int]]) -> int | None:
        """Tokens that fit after the prompt in every role's context; None: no limit."""

    def encode_answer(self, text: str) -> Sequence[int]:
        """Token ids of an existing answer, with an end token as a finished answer has.

        Raises RowError where the models cannot read it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer without special tokens."""

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones by name."""


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

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self._stop_ids

    def encode(
        self, messages: Sequence[Message], weights: Mapping[str, float], tools: Sequence[Tool] = ()
    ) -> dict[str, list[int]]:
        """Token ids of the prompt by role name; `weights` are in scope of the templates of roles that take them.

        Raises:
            RowError: a template refuses the messages, or a prompt is empty, is longer than its role's context, or has
                a token that the role's model does not know.
        """
        prompts = {name: self._encode_role(role, messages, weights, tools) for name, role in self._roles.items()}
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
        ids = self._encoders[BASE].encode_text(text)
        if (largest := max(ids, default=0)) >= self._answer_vocab_size:
            token = self._base.convert_ids_to_tokens(largest)
            raise RowError(
                f"the existing answer has the token {token!r} ({largest}), and the models of the run know "
                f"{self._answer_vocab_size} tokens only"
            )
        return [*ids, self._end_id] if self._end_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer without special tokens."""
        return str(self._base.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones by name."""
        return str(self._base.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode_role(
        self, role: Role, messages: Sequence[Message], weights: Mapping[str, float], tools: Sequence[Tool] = ()
    ) -> list[int]:
        encoder, template = self._encoders[role.host], self._templates[role.name]
        if template.text is None and tools:
            raise RowError("tools need a chat template, and the model has none: set base.chat_template")
        if template.text is None:
            return encoder.encode_text(_plain_text(messages, role.principle), starts=True)
        marked = encoder.mark(list(place(messages, role.principle, template)))

        def render(messages: Sequence[Message], tools: Sequence[Tool]) -> str:
            return self._render(role, messages, weights, tools)

        marked_tools = encoder.mark(list(tools))
        check_tools_written(render, marked, marked_tools, role.name)
        return encoder.encode_marked(render(marked, marked_tools))

    def _render(
        self, role: Role, messages: Sequence[Message], weights: Mapping[str, float], tools: Sequence[Tool]
    ) -> str:
        """The text of a conversation up to where the answer goes on."""
        tokenizer, encoder = self._hosts[role.host].tokenizer, self._encoders[role.host]
        template = self._templates[role.name]
        continues = messages[-1]["role"] == "assistant"  # the answer begins with this message
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                chat_template=template.text,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                principle=encoder.mark(role.principle or ""),
                **({"weights": dict(weights)} if role.takes_weights else {}),
                **{**template.variables, **({"tools": list(tools)} if tools else {})},
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
