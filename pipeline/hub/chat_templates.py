"""What a chat template does with a conversation, found out by rendering short ones. No model library is imported.

Templates are programs, and what matters here can only be seen in what they write: some refuse a system message, some
leave it out without a word, each ends an answer in its own way. A run renders its prompts with transformers; the
environment here is the same one, as far as templates use it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigurationError
from pipeline.hub.template_limits import limited
from pipeline.records import Message

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# words that no template writes by itself, plain enough to pass through its filters
SYSTEM_PROBE, USER_PROBE, ANSWER_PROBE = "qsystemq", "quserq", "qanswerq"
CALLS_CLOCK = re.compile(r"strftime_now\s*\(")
CLOCK = re.compile(r"""strftime_now\s*\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
# what `apply_chat_template` and the engine give a template or decide themselves
RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "principle",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
        "weights",
    }
)


class SystemMessages(StrEnum):
    """What a template does with a system message."""

    WRITTEN = "written"
    LEFT_OUT = "left out"
    REFUSED = "refused"


class PrincipleIn(StrEnum):
    """Where a principle stands in a prompt."""

    TEMPLATE = "template"
    SYSTEM = "system"
    USER = "user"


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """How the prompts of a role are written.

    Args:
        text: the Jinja template; None where the model has none, so that a prompt is the text of its only message.
        variables: values that the template reads besides the messages.
        system: what the template does with system messages. Where it does not write them, their text goes into the
            first user message.
        principle_in: where the role's principle goes, if it has one.
        reads_clock: whether the template asked for the time before it was written in.
    """

    text: str | None
    variables: Mapping[str, Any] = field(default_factory=dict)
    system: SystemMessages = SystemMessages.WRITTEN
    principle_in: PrincipleIn = PrincipleIn.SYSTEM
    reads_clock: bool = False


def render(template: str, messages: Sequence[Message], variables: Mapping[str, Any], *, asks: bool = True) -> str:
    """The text of a conversation; `asks` adds the start of an answer. Raises whatever the template raises."""
    values = {"tools": None, "documents": None, "principle": "", **variables}
    compiled = _compiled(template)
    return limited(lambda: compiled.render(messages=list(messages), add_generation_prompt=asks, **values))


@lru_cache(maxsize=256)
def variables_of(template: str) -> frozenset[str]:
    """The names that a template takes from outside. Raises ConfigurationError where it is no Jinja template."""
    from jinja2 import TemplateSyntaxError, meta

    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(template)))
    except TemplateSyntaxError as error:
        raise ConfigurationError(
            f"a chat template is not valid Jinja: line {error.lineno}: {error.message}"
        ) from error


def system_messages(template: str, variables: Mapping[str, Any]) -> SystemMessages:
    """What a template does with a system message, in a first question and in a later one.

    A template that cannot render these conversations without a system message either is not judged: WRITTEN.
    """
    system: Message = {"role": "system", "content": SYSTEM_PROBE}
    for conversation in _conversations():
        if _rendered(template, conversation, variables) is None:
            continue
        text = _rendered(template, [system, *conversation], variables)
        if text is None:
            return SystemMessages.REFUSED
        if SYSTEM_PROBE not in text:
            return SystemMessages.LEFT_OUT
    return SystemMessages.WRITTEN


def end_of_turn(template: str, variables: Mapping[str, Any], special_tokens: Mapping[str, int]) -> int | None:
    """The special token that a template writes right after an answer; None where it writes none there."""
    conversation = [{"role": "user", "content": USER_PROBE}, {"role": "assistant", "content": ANSWER_PROBE}]
    text = _rendered(template, conversation, variables, asks=False)
    if text is None or ANSWER_PROBE not in text:
        return None
    after = text.rpartition(ANSWER_PROBE)[2].lstrip()
    found = [token for token in special_tokens if token and after.startswith(token)]
    return special_tokens[max(found, key=len)] if found else None


def reads_clock(template: str) -> bool:
    """Whether a template asks what day it is."""
    return CALLS_CLOCK.search(template) is not None


def pin_clock(template: str, now: datetime) -> str:
    """The template with the time written in: what it renders is then the same on every machine and every day.

    Raises:
        ConfigurationError: it asks for the time in a form that it computes, which cannot be written in.
    """

    def written(call: re.Match[str]) -> str:
        return json.dumps(now.strftime(call[1] if call[1] is not None else call[2]), ensure_ascii=False)

    pinned = CLOCK.sub(written, template)
    if reads_clock(pinned):
        raise ConfigurationError(
            "a chat template computes the format of strftime_now, so its time cannot be kept the same for a whole "
            "run: set chat_template (base) or template (principal) to a template with a quoted format"
        )
    return pinned


def plan_whole(
    place: str,
    text: str,
    kwargs: Mapping[str, Any],
    time: datetime | None,
    named_tokens: Mapping[str, str],
) -> PromptTemplate:
    """How whole conversations are written for what only reads them, by the rules of a run's prompts.

    Args:
        place: of the settings, for messages.
        text: the Jinja template.
        kwargs: values that it reads besides the messages.
        time: that it is given.
        named_tokens: special tokens by the names that templates know.

    Raises:
        ConfigurationError: a value has no effect, or the template asks for a time that is not stated.
    """
    check_kwargs(place, kwargs, text)
    if "messages" not in variables_of(text):
        raise ConfigurationError(f"{place}: its chat template uses no messages, so it would read one text for all")
    asks = reads_clock(text)
    if asks and time is None:
        raise ConfigurationError(
            f"{place}.chat_template_time is missing: the chat template asks for the time, and scores of another day "
            "would be others; give a date such as 2026-01-31"
        )
    if time is not None and not asks:
        raise ConfigurationError(f"{place}.chat_template_time has no effect: the chat template asks for no time")
    pinned = pin_clock(text, time) if time is not None else text
    return PromptTemplate(pinned, kwargs, system_messages(pinned, {**named_tokens, **kwargs}), reads_clock=asks)


def check_kwargs(place: str, kwargs: Mapping[str, Any], template: str | None) -> None:
    """Refuse values that would have no effect. Raises ConfigurationError."""
    if not kwargs:
        return
    where = f"{place}.chat_template_kwargs"
    if template is None:
        raise ConfigurationError(f"{where} has no effect: the model has no chat template")
    for name in sorted(kwargs.keys() & RESERVED):
        raise ConfigurationError(f"{where}.{name} is set by the run itself and cannot be given")
    known = variables_of(template)
    for name in sorted(kwargs.keys() - known):
        others = ", ".join(sorted(known - RESERVED)) or "nothing"
        raise ConfigurationError(f"{where}.{name} has no effect: the chat template does not use it; it uses {others}")


def _conversations() -> Iterator[list[Message]]:
    """A question, and a question after an answer."""
    question: Message = {"role": "user", "content": USER_PROBE}
    yield [question]
    yield [question, {"role": "assistant", "content": ANSWER_PROBE}, question]


def _rendered(
    template: str, messages: Sequence[Message], variables: Mapping[str, Any], *, asks: bool = True
) -> str | None:
    """The text, or None where the template refuses the messages: it is a program and may fail in any way."""
    try:
        return render(template, messages, variables, asks=asks)
    except Exception:
        return None


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment of transformers' templates: its filters, functions and tags."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model writes; it is rendered as it is."""

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    Generation.tags = {"generation"}

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
