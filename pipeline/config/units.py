"""What games are about, and which rules, principals and options go with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from cage.rule_names import RuleName
from pipeline.principals.section import PrincipalSection


class Unit(StrEnum):
    """What a game is about."""

    TOKEN = "token"
    BLOCK = "block"
    ANSWER = "answer"


OF_BLOCKS = frozenset({"decoding.block_tokens", "decoding.block_end"})
OF_DRAWN = frozenset({"decoding.proposals", "decoding.proposals_by"})
OF_TEXTS = OF_BLOCKS | OF_DRAWN
OF_TOKENS = frozenset({"decoding.thinking.max_tokens", "decoding.thinking.steer"})


def check_options(units: Sequence[Unit], given: Collection[str]) -> None:
    """Raise ValueError for options that have no effect, or need other units.

    Args:
        units: of the run.
        given: dotted names of options that are not at their defaults.
    """
    shown = ", ".join(units)
    for unit, names, wanted in ((Unit.TOKEN, OF_TEXTS, "block or answer"), (None, OF_BLOCKS, "block")):
        applies = units == (unit,) if unit else Unit.BLOCK not in units
        if applies and (unused := names.intersection(given)):
            raise ValueError(f"{', '.join(sorted(unused))}: no effect with unit: {shown}; choose unit: {wanted}")
    if units != (Unit.TOKEN,) and (lost := OF_TOKENS.intersection(given)):
        raise ValueError(f"{', '.join(sorted(lost))} need unit: token; got unit: {shown}")
    if units != (Unit.ANSWER,) and "input.candidates" in given:
        raise ValueError(f"input.candidates needs unit: answer; got unit: {shown}")
    if "input.candidates" in given and (unused := OF_DRAWN.intersection(given)):
        raise ValueError(f"{', '.join(sorted(unused))}: no effect with input.candidates, which are not drawn")


def check_principals(units: Sequence[Unit], principals: Mapping[str, PrincipalSection], place: str) -> None:
    """Raise ValueError where games are over tokens and a principal values text alone.

    Args:
        units: of the run.
        principals: by name.
        place: where the units are configured.
    """
    for name, principal in principals.items():
        if principal.judged_by is not None and Unit.TOKEN in units:
            raise ValueError(
                f"principals.{name}: a {principal.kind} values text and no tokens; choose {place}: block or answer; "
                f"got {', '.join(units)}"
            )


def check_rules(units: Sequence[Unit], rules: Sequence[RuleName], place: str) -> None:
    """Raise ValueError for a rule that is for none of the units; `place` is where rules are configured."""
    for rule in rules:
        if not rule.serves_tokens and units == (Unit.TOKEN,):
            raise ValueError(f"{place}: {rule} chooses among blocks or answers; choose unit: block or answer")
        if not rule.serves_texts and Unit.TOKEN not in units:
            raise ValueError(f"{place}: {rule} draws tokens and needs unit: token; got unit: {', '.join(units)}")


def check_one_reward_model(principals: Mapping[str, PrincipalSection]) -> None:
    """Raise ValueError unless all principals use one reward model that can be used at the row's weights (`parm`)."""
    if not principals:
        raise ValueError("rule parm needs principals of kind preference_arm, and there are none")
    first, *others = principals
    for name, principal in principals.items():
        if not principal.roles_at_weights():
            raise ValueError(
                f"rule parm uses one reward model at the weights of all principals; principals.{name} is of kind "
                f"{principal.kind}, and must be a preference_arm"
            )
    for name in others:
        if _reward_model(principals[name]) != _reward_model(principals[first]):
            raise ValueError(
                f"rule parm uses one reward model at the weights of all principals; principals.{name} must have the "
                f"adapter, model, reference, template and chat_template_kwargs of principals.{first}"
            )


def _reward_model(principal: PrincipalSection) -> list[object]:
    """What two principals must have in common to share a reward model."""
    requests = [replace(each, objective=None) for each in principal.roles_at_weights().values()]
    return [*requests, principal.template, principal.chat_template_kwargs]
