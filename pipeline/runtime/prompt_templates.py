"""Finds out how each role's prompts are written: by which template, and where a principle goes in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.hub.chat_templates import (
    PrincipleIn,
    PromptTemplate,
    SystemMessages,
    check_kwargs,
    end_of_turn,
    pin_clock,
    reads_clock,
    system_messages,
    variables_of,
)
from pipeline.hub.tokenizer_facts import TokenizerFacts
from pipeline.protocol.topology import BASE, Role, Topology
from pipeline.quoting import one_line

FILE_NAME = re.compile(r"[^{}\n]*\.(jinja2?|j2|txt|json|tmpl)")  # given in place of a template


def plan_templates(
    config: Config, topology: Topology, tokenizers: Mapping[str, TokenizerFacts], now: datetime
) -> dict[str, PromptTemplate]:
    """How the prompts of each role are written, by role.

    Args:
        config: of the run.
        topology: its roles.
        tokenizers: facts of each host's tokenizer, by host name.
        now: the time that templates are given.

    Raises:
        ConfigurationError: a template is not Jinja, or does not read a value or a principle that it is given.
    """
    templates = {}
    for name, role in topology.roles.items():
        own = tokenizers[role.host]
        text = role.chat_template or own.chat_template or tokenizers[BASE].chat_template
        if own.other_templates and not role.chat_template:
            key = "base.chat_template" if name == BASE else f"principals.{name.partition('.')[0]}.template"
            raise ConfigurationError(
                f"the tokenizer of {role.host} has chat templates named {', '.join(own.other_templates)} and none "
                f"named default; give one of them as {key}"
            )
        place = BASE if name == BASE else f"principals.{name.partition('.')[0]}"
        check_kwargs(place, _given_kwargs(config, name), text)
        templates[name] = _plan_template(role, place, text, own, topology.weights, now)
    if config.base.chat_template_time is not None and not any(each.reads_clock for each in templates.values()):
        raise ConfigurationError(
            "base.chat_template_time has no effect: no chat template of the run asks for the time"
        )
    return templates


def end_of_answer(template: PromptTemplate, tokenizer: TokenizerFacts) -> int | None:
    """What follows a finished answer: the token that the template writes there, or else the tokenizer's end."""
    if template.text is None:
        return tokenizer.eos_token_id
    variables = {**tokenizer.named_tokens, **template.variables}
    found = end_of_turn(template.text, variables, tokenizer.special_tokens)
    return tokenizer.eos_token_id if found is None else found


def _plan_template(
    role: Role, place: str, text: str | None, tokenizer: TokenizerFacts, weights: Mapping[str, float], now: datetime
) -> PromptTemplate:
    if text is None:
        if role.placement == "system":
            raise ConfigurationError(f"{place}.placement: system needs a chat template, and the model has none")
        return PromptTemplate(None)
    in_scope = {**({"weights": weights} if role.takes_weights else {}), **role.template_kwargs}
    names = variables_of(text)
    if "messages" not in names and (role.name == BASE or FILE_NAME.fullmatch(text.strip())):
        hint = (
            "; it is the Jinja text itself, and not the name of a file" if FILE_NAME.fullmatch(text.strip()) else ""
        )
        raise ConfigurationError(
            f"the chat template of {role.name} uses no messages, so every prompt would be the same: "
            f"{one_line(text)[:60]!r}{hint}"
        )
    pinned = pin_clock(text, now)
    system = system_messages(pinned, {**tokenizer.named_tokens, **in_scope})
    principle_in = _place(role, place, names, system) if role.principle is not None else PrincipleIn.SYSTEM
    return PromptTemplate(pinned, role.template_kwargs, system, principle_in, reads_clock(text))


def _place(role: Role, place: str, names: frozenset[str], system: SystemMessages) -> PrincipleIn:
    """Where the role's principle goes. Raises ConfigurationError where the prompt would not hold it."""
    if "principle" in names:
        if role.placement != "auto":
            raise ConfigurationError(
                f"{place}.placement: {role.placement} has no effect, because the template places the principle "
                "itself; leave placement out"
            )
        return PrincipleIn.TEMPLATE
    if "messages" not in names:
        raise ConfigurationError(
            f"{place}: its chat template uses neither messages nor principle, so the principle would change nothing"
        )
    if role.placement == "system" and system is not SystemMessages.WRITTEN:
        raise ConfigurationError(
            f"{place}.placement: system does not work, because system messages are {system} by the chat template; "
            "use user or auto"
        )
    if role.placement == "user" or system is not SystemMessages.WRITTEN:
        return PrincipleIn.USER
    return PrincipleIn.SYSTEM


def _given_kwargs(config: Config, role: str) -> Mapping[str, Any]:
    """The values that the configuration names for this role, without those that it inherits."""
    section = config.base if role == BASE else config.principals[role.partition(".")[0]]
    return section.chat_template_kwargs
