"""Where proposed tokens come from, and what they do not go with."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config.units import Unit
from pipeline.sections import shortened


class DraftSource(StrEnum):
    """Where proposed tokens come from."""

    RESPONSE = "response"
    SIBLINGS = "siblings"
    LOOKUP = "lookup"


NEEDS = {
    DraftSource.RESPONSE: "needs existing answers; set input.response",
    DraftSource.SIBLINGS: "needs several answers to a prompt: a grid, or decoding.n",
}


def read_draft(value: Any) -> Any:
    """Accept one source where a list is expected. Raises ValueError for what is no source."""
    value = (value,) if isinstance(value, str) and value not in ("auto", "off") else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    known = ", ".join(DraftSource)
    for each in value:
        if each in ("model", "reference"):
            raise ValueError(
                f"{each}: proposals of a model take passes of their own and are not made; choose from {known}"
            )
        if each not in list(DraftSource):
            raise ValueError(f"draft is auto, off, or a list of {known}; got {shortened(each)}")
    if len(set(value)) != len(value):
        raise ValueError(f"draft names each source once; got {', '.join(value)}")
    return value


Draft = Annotated[
    Literal["auto", "off"] | Annotated[tuple[DraftSource, ...], Field(min_length=1)], BeforeValidator(read_draft)
]


def why_not_drafted(draft: Draft, units: Sequence[Unit], target_kl: float | None) -> tuple[str, ...]:
    """Why no tokens are proposed, as far as settings say; empty where none keeps them from it."""
    reasons = {
        "draft is off": draft == "off",
        f"unit is {', '.join(units)}, and drafts are of tokens": tuple(units) != (Unit.TOKEN,),
        "target_kl is set: a game depends on how far those before it left the base": target_kl is not None,
    }
    return tuple(reason for reason, holds in reasons.items() if holds)


def check_draft(draft: Draft, undrafted: Sequence[str], *, has_existing: bool, has_siblings: bool) -> None:
    """Raise ValueError for named sources that have no effect.

    Args:
        draft: as configured.
        undrafted: what `why_not_drafted` says.
        has_existing: whether rows come with answers.
        has_siblings: whether a prompt has several answers.
    """
    if isinstance(draft, str):
        return
    if undrafted:
        raise ValueError(f"decoding.draft: {', '.join(draft)} has no effect: {'; '.join(undrafted)}")
    for source, is_there in ((DraftSource.RESPONSE, has_existing), (DraftSource.SIBLINGS, has_siblings)):
        if source in draft and not is_there:
            raise ValueError(f"decoding.draft: {source} {NEEDS[source]}, or leave it out")
