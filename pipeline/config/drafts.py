"""Where proposed tokens come from, and what they do not go with."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.units import Unit
from pipeline.sections import ModelConfig, Section, model_from_name, shortened


class DraftSource(StrEnum):
    """Where proposed tokens come from."""

    RESPONSE = "response"
    SIBLINGS = "siblings"
    LOOKUP = "lookup"
    MODEL = "model"


class DraftModelConfig(Section):
    """A small language model with the base's tokens, or the base's first layers, beside the coordinator."""

    model: str | None = Field(
        None, min_length=1, description="folder, hub id, s3:// folder, or smollm2-135m; null: the base's own weights"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; null: its main branch")
    layers: int | None = Field(
        None, ge=1, description="its first layers alone, followed by its own norm and head; null: all of them"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto: a GPU where there is one, unless the base is on a CPU; over Ray it is a CPU; cpu, cuda or "
        "cuda:N",
    )

    @model_validator(mode="after")
    def _names_weights(self) -> DraftModelConfig:
        if self.model is None and (self.layers is None or self.revision is not None):
            raise ValueError(
                "name a model, or give the number of the base's layers; got "
                + ("neither" if self.revision is None else f"revision: {self.revision} of no model")
            )
        return self

    def section(self, base: ModelConfig) -> ModelConfig:
        """The model as a section that can be resolved."""
        device = "cpu" if self.device == "auto" and base.device == "cpu" else self.device
        if self.model is not None:
            base = ModelConfig(model=self.model, revision=self.revision)
        # in the coordinator's process, which has its CPU already
        whole = {"tensor_parallel": 1, "pipeline_parallel": 1}
        own = {"device": device, "attention": "slots", "resources": {"num_cpus": 0}, **whole}
        return ModelConfig(**(base.model_dump(include=set(ModelConfig.model_fields)) | own))


DraftModel = Annotated[DraftModelConfig, BeforeValidator(model_from_name)]
NEEDS = {
    DraftSource.RESPONSE: "needs existing answers; set input.response",
    DraftSource.SIBLINGS: "needs several answers to a prompt: a grid, or decoding.n",
    DraftSource.MODEL: "needs a model; set decoding.draft_model",
}


def read_draft(value: Any) -> Any:
    """Accept one source where a list is expected, and YAML's `off`. Raises ValueError for what is no source."""
    if value is False:  # off and no are booleans in YAML
        return "off"
    value = (value,) if isinstance(value, str) and value not in ("auto", "off") else value
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    known = ", ".join(DraftSource)
    for each in value:
        if each == "reference":
            raise ValueError(
                "reference: what the base would draw next is known with the pass that draws it, so it proposes "
                f"nothing; choose from {known}"
            )
        if each not in list(DraftSource):
            raise ValueError(f"draft is auto, off, or a list of {known}; got {shortened(each)}")
    if len(set(value)) != len(value):
        raise ValueError(f"draft names each source once; got {', '.join(value)}")
    return value


Draft = Annotated[
    Literal["auto", "off"] | Annotated[tuple[DraftSource, ...], Field(min_length=1)], BeforeValidator(read_draft)
]


def why_not_drafted(
    draft: Draft, units: Sequence[Unit], target_kl: float | None, *, depends: bool
) -> tuple[str, ...]:
    """Why no tokens are proposed, as far as settings say; empty where none keeps them from it.

    Args:
        draft: as configured.
        units: of the games.
        target_kl: as configured.
        depends: whether last bits would depend on drafts that were not asked for.
    """
    reasons = {
        "draft is off": draft == "off",
        f"unit is {', '.join(units)}, and drafts are of tokens": tuple(units) != (Unit.TOKEN,),
        "target_kl is set: a game depends on how far those before it left the base": target_kl is not None,
        "reproducibility is relaxed: last bits would depend on what is drafted; name sources if they may": depends,
    }
    return tuple(reason for reason, holds in reasons.items() if holds)


def check_draft(
    draft: Draft, undrafted: Sequence[str], *, has_existing: bool, has_siblings: bool, has_model: bool
) -> None:
    """Raise ValueError for named sources, or a model, that have no effect.

    Args:
        draft: as configured.
        undrafted: what `why_not_drafted` says.
        has_existing: whether rows come with answers.
        has_siblings: whether a prompt has several answers.
        has_model: whether there is a model that proposes tokens.
    """
    if has_model and draft != "auto" and DraftSource.MODEL not in draft:
        said = draft if isinstance(draft, str) else f"[{', '.join(draft)}]"
        raise ValueError(f"decoding.draft_model has no effect with draft: {said}; add model to it, or say auto")
    if has_model and undrafted:
        raise ValueError(f"decoding.draft_model has no effect: {'; '.join(undrafted)}; leave it out")
    if isinstance(draft, str):
        return
    if undrafted:
        raise ValueError(f"decoding.draft: {', '.join(draft)} has no effect: {'; '.join(undrafted)}")
    needed = {
        DraftSource.RESPONSE: has_existing,
        DraftSource.SIBLINGS: has_siblings,
        DraftSource.MODEL: has_model,
    }
    for source, is_there in needed.items():
        if source in draft and not is_there:
            raise ValueError(f"decoding.draft: {source} {NEEDS[source]}, or leave it out")
