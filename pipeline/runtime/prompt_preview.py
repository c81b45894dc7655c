"""Finds out what each role will read, before models are loaded: its prompt of a row, and what is odd in templates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.engine.prompts import ChatPrompter, HostText
from pipeline.errors import RowError
from pipeline.hub.chat_templates import SystemMessages, variables_of
from pipeline.hub.file_tokenizer import open_tokenizer
from pipeline.records import Row
from pipeline.runtime.replica_plan import ReplicaPlan


@dataclass(frozen=True, slots=True)
class PromptPreview:
    """A prompt of one role.

    Args:
        text: of the prompt, special tokens included.
        num_tokens: of the prompt.
        special_tokens: how often each special token is in it, in order of appearance.
    """

    text: str
    num_tokens: int
    special_tokens: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ContextFit:
    """How a row fits into the contexts of its roles.

    Args:
        left: tokens that fit after the prompt in every context; None where no model states a limit.
        existing: tokens of the existing answer; 0 without one.
    """

    left: int | None
    existing: int


class PromptPreviewer:
    """Writes prompts as a run would, with what is known of it before models are loaded.

    Args:
        replica: the plan of the run's models.

    Raises:
        ConfigurationError: a tokenizer cannot be read.
    """

    def __init__(self, replica: ReplicaPlan) -> None:
        self._replica = replica
        self._hosts = {}
        for spec in replica.hosts:
            facts, tokens = replica.facts[spec.name], replica.tokenizers[spec.name]
            tokenizer = open_tokenizer(spec.source, tokens)
            special = frozenset(tokens.special_tokens)
            self._hosts[spec.name] = HostText(tokenizer, facts.context_length, facts.vocab_size, special)
        self._prompter = ChatPrompter(
            replica.topology,
            self._hosts,
            replica.templates,
            replica.stop_ids,
            replica.end_id,
            replica.hosts[0].vocab_size,
            allow_special_tokens=replica.config.input.allow_special_tokens,
            reasoning=replica.reasoning,
            thinking=replica.config.decoding.thinking,
        )

    def prompts(self, row: Row) -> dict[str, PromptPreview]:
        """The prompts of a row, by role. Raises RowError where a role cannot read it."""
        return {name: self._preview(name, ids) for name, ids in self._encode(row).items()}

    def start_notes(self, row: Row) -> Iterator[str]:
        """A sentence for each given chat template that leaves out the token with which the tokenizer begins texts.

        Models are trained with that token, and a prompt without it is read as something else.
        """
        for name, ids in self._encode(row).items():
            role = self._replica.topology.roles[name]
            begins = int(next(iter(self._hosts[role.host].tokenizer("a")["input_ids"]), -1))
            tokens = self._replica.tokenizers[role.host]
            if role.chat_template and begins in tokens.special_tokens.values() and ids[:1] != [begins]:
                yield (
                    f"the prompts of {name} do not begin with {tokens.token_by_id[begins]}, with which its tokenizer "
                    "begins texts: write {{ bos_token }} at the start of the chat template, unless the model is "
                    "meant to read prompts without it"
                )

    def fit(self, row: Row) -> ContextFit:
        """How much of every context a row leaves. Raises RowError where a role cannot read it."""
        prompts = self._encode(row)
        existing = self._prompter.encode_existing(row, prompts)[0] if row.response is not None else ()
        return ContextFit(self._prompter.context_left(prompts), len(existing))

    def _encode(self, row: Row) -> dict[str, list[int]]:
        if row.error is not None:
            raise RowError(row.error)
        own = {name: weight for name, weight in (row.weights or {}).items() if weight is not None}
        weights = {**self._replica.topology.weights, **own}
        return self._prompter.encode(row.messages, weights, row.tools, self._prompter.kwargs_of(row))

    def _preview(self, role: str, ids: list[int]) -> PromptPreview:
        host = self._replica.topology.roles[role].host
        names = {token_id: token for token, token_id in self._replica.tokenizers[host].special_tokens.items()}
        special = Counter(names[token_id] for token_id in ids if token_id in names)
        tokenizer = self._hosts[host].tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return PromptPreview(str(text), len(ids), special)


def template_notes(replica: ReplicaPlan) -> Iterator[str]:
    """What a user should know of the chat templates of a run, a sentence each."""
    topology, templates = replica.topology, replica.templates
    lacking = [plan.name for plan in topology.hosts if not replica.tokenizers[plan.name].has_chat_template]
    for host in lacking:
        plain = [name for name, role in topology.roles.items() if role.host == host and templates[name].text is None]
        if plain:
            yield (
                f"the tokenizer of {host} has no chat template: {', '.join(plain)} reads the text of a single "
                "message as it is, and rows with more messages fail"
            )
        else:
            yield f"the tokenizer of {host} has no chat template; one of the configuration or of the base is used"
    for outcome in (SystemMessages.REFUSED, SystemMessages.LEFT_OUT):
        names = [
            name
            for name, each in templates.items()
            if each.text is not None and each.system is outcome and "messages" in variables_of(each.text)
        ]
        if names:
            yield (
                f"system messages are {outcome} by the chat template of {', '.join(names)}: principles and the rows' "
                "own system messages go before the first user message"
            )
    for name, section in replica.config.principals.items():
        if section.template is not None and not variables_of(section.template) & {"messages"}:
            also = "" if "principle" in variables_of(section.template) else " nor principle"
            word = "neither messages" if also else "no messages"
            yield f"principals.{name}.template uses {word}{also}: {name} reads the same prompt in every row"
    if replica.reasoning is not None:
        yield _reasoning_note(replica)
    if replica.template_time is not None:
        yield "chat templates ask for the time; all prompts have that of the run's beginning"


def _reasoning_note(replica: ReplicaPlan) -> str:
    """What becomes of the base's reasoning."""
    assert replica.reasoning is not None
    thinking = replica.config.decoding.thinking
    markers = replica.reasoning.describe()
    parts = [f"the base may reason before it answers ({markers}): its reasoning is the column reasoning"]
    parts.append("and part of response as well" if thinking.in_answers else "and no part of response")
    parts.append("principals steer both" if thinking.steer else "principals leave it alone")
    if thinking.max_tokens is not None:
        parts.append(f"it is closed after {thinking.max_tokens:,} tokens")
    return ", ".join(parts)
