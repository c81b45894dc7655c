"""What every section of a configuration is, and the section that names one model.

The principals' sections build on these; `pipeline.config.sections` puts all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import InitErrorDetails

EMBEDDED_MODEL = "smollm2-135m"
Placement = Literal["auto", "system", "user"]
QuantizationKind = Literal["bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-float8", "quanto-int8", "fp8"]


def shortened(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _types_within(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _types_within(part)


class Section(BaseModel):
    """A frozen section that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """Refuse true and false where a number is wanted: pydantic would read them as 1 and 0."""
        faults = []
        for name, field in cls.model_fields.items():
            value = values.get(name) if isinstance(values, dict) else None
            if not any(isinstance(each, bool) for each in (value if isinstance(value, list) else [value])):
                continue
            kinds = set(_types_within(field.annotation))
            if bool not in kinds and kinds & {int, float}:
                kind = "float_type" if float in kinds else "int_type"
                faults.append(InitErrorDetails(type=kind, loc=(name,), input=value))
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return values


class Resources(Section):
    """What Ray reserves for a host, or for each of its ranks. `num_gpus: null`: one GPU where the device is a GPU,
    N with `pipeline_parallel: N`."""

    num_cpus: float = Field(1, ge=0, description="CPU cores")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs; a share lets several hosts use one; null: one where the device is a GPU, or "
        "as many as layers are spread over",
    )


class ModelSizes(Section):
    """Sizes of a decoder such as LLaMA, with gated feed-forward layers.

    `cage plan` reckons with them where the model's own config.json cannot be had. No run reads them.
    """

    layers: int = Field(ge=1, description="decoder layers")
    hidden_size: int = Field(ge=1, description="width of a hidden state")
    intermediate_size: int = Field(ge=1, description="width inside a feed-forward layer")
    heads: int = Field(ge=1, description="attention heads")
    kv_heads: int | None = Field(None, ge=1, description="heads of keys and values; null: as many as heads")
    vocab_size: int = Field(ge=1, description="rows of the embedding")
    is_tied: bool = Field(False, description="whether the head's weights are the embedding's")


class QuantizationConfig(Section):
    """How the weights of a model are quantised while they are loaded, by transformers' own quantisers."""

    kind: QuantizationKind = Field(
        description="bnb-4bit: NF4 by bitsandbytes, scales quantised too; bnb-8bit: LLM.int8() by bitsandbytes; "
        "torchao-int8, torchao-float8 and quanto-int8: weights alone; fp8: blocks of 128 by 128, weights and inputs, "
        "on a GPU of compute capability 8.9 or more"
    )


def _kind_of_quantization(value: Any) -> Any:
    """Accept the bare name of a kind."""
    return {"kind": value} if isinstance(value, str) else value


class ModelConfig(Section):
    """One set of weights."""

    model: str = Field(min_length=1, description=f"folder, hub id, s3:// folder, or {EMBEDDED_MODEL}")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; null: its main branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    quantization: Annotated[QuantizationConfig | None, BeforeValidator(_kind_of_quantization)] = Field(
        None, description="quantise the weights while they are loaded; null: as its files have them"
    )
    sizes: ModelSizes | None = Field(
        None, description="what `cage plan` reckons with where the model cannot be had; no run reads it"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="processes that the weights are split over, with a GPU each where there are GPUs"
    )
    pipeline_parallel: int = Field(
        1, ge=1, le=64, description="GPUs of one process that the layers are spread over, each with a range of them"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU where there is one; cpu, cuda or cuda:N"
    )
    resources: Resources = Resources()
    attention: Literal["auto", "slots", "plain"] = Field(
        "auto",
        description="slots: all rows in one pass. plain: one row at a time, slow and right for every family. "
        "auto: slots where they are exact, else plain",
    )

    @model_validator(mode="after")
    def _ranks_have_a_gpu_each(self) -> ModelConfig:
        num_gpus = self.resources.num_gpus
        if self.tensor_parallel > 1 and self.quantization is not None:
            raise ValueError(
                f"quantised weights are not split over ranks: leave out quantization ({self.quantization.kind}), or "
                f"set tensor_parallel to 1; got {self.tensor_parallel}"
            )
        if self.tensor_parallel > 1 and num_gpus not in (None, 0, 1):
            raise ValueError(
                f"resources are those of each rank, which has one GPU or none: with tensor_parallel: "
                f"{self.tensor_parallel} num_gpus must be null, 0 or 1; got {num_gpus:g}"
            )
        return self

    @model_validator(mode="after")
    def _layers_are_on_gpus(self) -> ModelConfig:
        count, num_gpus = self.pipeline_parallel, self.resources.num_gpus
        if count == 1:
            return self
        if self.tensor_parallel > 1:
            raise ValueError(
                f"a model is split by layers or within them: set tensor_parallel or pipeline_parallel to 1; got "
                f"{self.tensor_parallel} and {count}"
            )
        if self.quantization is not None:
            raise ValueError(
                f"quantised weights are not spread over devices: leave out quantization ({self.quantization.kind}), "
                f"or set pipeline_parallel to 1; got {count}"
            )
        if self.device == "cpu":
            raise ValueError(
                f"pipeline_parallel spreads layers over GPUs: with device: cpu it must be 1; got {count} "
                "(tensor_parallel splits them over processes of a CPU)"
            )
        if num_gpus not in (None, count):
            raise ValueError(
                f"resources are those of the process: with pipeline_parallel: {count} num_gpus must be null or "
                f"{count}; got {num_gpus:g}"
            )
        return self


def on_one_device(model: ModelConfig) -> ModelConfig:
    """Refuse a model that is split over processes or devices, for where that has no effect."""
    for name in ("tensor_parallel", "pipeline_parallel"):
        if (count := getattr(model, name)) > 1:
            raise ValueError(f"{name} must be 1 here, as one process runs it on one device; got {count}")
    return model


class BaseConfig(ModelConfig):
    """The agent: the base LLM."""

    chat_template: str | None = Field(None, description="Jinja chat template instead of the tokenizer's own")
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="what the chat template reads besides messages, such as enable_thinking"
    )
    chat_template_time: datetime | None = Field(
        None, description="the time that chat templates are given by strftime_now; null: when the run begins"
    )


class ReferenceConfig(ModelConfig):
    """The reference model of a reward."""


def model_from_name(value: Any) -> Any:
    """Accept a bare model name where a model section is expected."""
    return {"model": value} if isinstance(value, str) else value
