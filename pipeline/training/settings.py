"""The configuration of `cage train`: preference data, a backbone, and how principals are trained."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.sections import PRINCIPAL_NAME, Transport, as_list
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.sections import EMBEDDED_MODEL, BaseConfig, Section, model_from_name, on_one_device

OBJECTIVE = "preferred"  # the objective's name where the data have one objective and no name for it


class Loss(StrEnum):
    """What is trained, and by which loss."""

    ARM = "arm"
    DPO = "dpo"
    VALUE = "value"
    PREFERENCE_ARM = "preference_arm"


PairsFormat = Literal["auto", "pairs", "pku-saferlhf", "helpsteer2", "ultrafeedback"]


class PairsInputConfig(Section):
    """Where the preference data are, and how their columns say which answer is better.

    One of three shapes; without any column named here it is recognised:

    - pairs: `chosen` and `rejected`, as text after `prompt`, as messages, or as transcripts with the prompt in both;
    - two `responses` and, by objective, a column that names the better one (`preferred`);
    - scored answers: one `response` a row, or a list of `answers` a row, with `scores` by objective.
    """

    path: str = Field(
        min_length=1,
        description="file, folder, s3:// or gs:// address, a datasets name, or a run of cage synthesize",
    )
    format: PairsFormat = Field("auto", description="of the records; auto: recognised by their columns")
    prompt: str | None = Field(None, description="column with the prompt: a text, messages, or a transcript")
    system: str | None = Field(
        None, description="column with the system message before the prompt; null: `system`, where there is one"
    )
    chosen: str | None = Field(None, description="column with the better answer, or conversation")
    rejected: str | None = Field(None, description="column with the worse answer, or conversation")
    responses: tuple[str, str] | None = Field(None, description="columns of the two answers of a row")
    preferred: dict[str, str] = Field(
        default_factory=dict, description="by objective: the column that says which of `responses` is better"
    )
    answers: str | None = Field(None, description="column with a list of scored answers to one prompt")
    response: str | None = Field(
        None, description="column with the row's answer, or the key of the text in each of `answers`"
    )
    scores: dict[str, str] = Field(
        default_factory=dict,
        description="by objective: the column of its score, or a dotted path into it; a leading - where lower is "
        "better",
    )
    objective: str | None = Field(
        None, description=f"the objective's name, where pairs are of one; null: {OBJECTIVE}, or what scored the pairs"
    )
    objectives: str | None = Field(None, description="column with the objective of each pair")
    min_margin: float = Field(0.0, ge=0, description="least difference of two scores that makes a pair")
    max_pairs: int = Field(8, ge=1, description="pairs of scored answers to one prompt and objective; widest first")
    limit: int | None = Field(None, ge=1, description="first rows only")
    allow_special_tokens: bool = Field(
        False, description="read special tokens that the texts spell, such as <|im_end|>, as tokens"
    )
    split: str = Field("train", description="split, when path is a datasets name")
    subset: str | None = Field(None, description="configuration name, when path is a datasets name")

    @model_validator(mode="after")
    def _one_shape(self) -> PairsInputConfig:
        shapes = {
            "chosen and rejected": self.chosen or self.rejected,
            "responses and preferred": self.responses or self.preferred,
            "scores": self.scores or self.answers or self.response,
        }
        named = [shape for shape, is_named in shapes.items() if is_named]
        if len(named) > 1:
            raise ValueError(f"name the columns of one shape, not of several ({'; '.join(named)})")
        if bool(self.chosen) != bool(self.rejected):
            raise ValueError("name both chosen and rejected")
        if self.objective is not None and self.objectives is not None:
            raise ValueError("give either objective, a name, or objectives, a column of names")
        for name in (*self.preferred, *self.scores, *([self.objective] if self.objective else [])):
            check_objective(name)
        return self


def check_objective(name: str) -> str:
    """The name itself. Raises ValueError where it could not be a principal's name and a folder's."""
    if not PRINCIPAL_NAME.fullmatch(name):
        raise ValueError(f"an objective's name has letters, digits, _ and -, and starts with a letter; got {name!r}")
    return name


class TrainingConfig(Section):
    """How adapters are trained. Every field changes them and is part of the fingerprint, but for `device_batch_size`.

    The defaults of `beta` are GenARM's for `arm` and TRL's for `dpo`.
    """

    loss: Loss = Field(
        Loss.ARM,
        description="arm: an autoregressive reward model (GenARM); dpo: a tuned policy; value: a value head; "
        "preference_arm: one reward model for all objectives, which depends on the weights (PARM)",
    )
    objectives: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        (), description="which of the data's objectives are trained; empty: all"
    )
    epochs: float = Field(2.0, gt=0, le=1000, description="passes over the pairs")
    learning_rate: float = Field(5e-4, gt=0, description="the highest of its schedule")
    beta: float | None = Field(None, gt=0, description="null: 0.05 for arm and preference_arm, 0.1 for dpo")
    length_normalization: bool = Field(False, description="arm: compare mean log-likelihoods of tokens, not sums")
    rank: int = Field(8, ge=1, le=1024, description="of the LoRA adapter")
    preference_rank: int = Field(4, ge=1, le=256, description="preference_arm: the rank that depends on the weights")
    concentration: float = Field(
        1.0, gt=0, description="preference_arm: of the Dirichlet distribution that preference vectors are drawn from"
    )
    alpha: float | None = Field(None, gt=0, description="LoRA's alpha; null: twice the rank")
    target_modules: Annotated[tuple[str, ...], BeforeValidator(as_list)] | Literal["all-linear"] = Field(
        "all-linear", description="layers that the adapter changes, by the ends of their names"
    )
    batch_size: int = Field(8, ge=1, description="pairs (value: answers) in one step of the optimizer")
    device_batch_size: int = Field(4, ge=1, description="pairs that a device computes at once")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of the optimizer")
    max_length: int = Field(1024, ge=8, description="tokens of prompt and answer; longer pairs are left out")
    validation: float = Field(0.1, ge=0, lt=1, description="share of the prompts that are held out")
    judge: AnyJudge | None = Field(None, description="value: scores the answers, where the data have no scores")
    checkpoints: int = Field(10, ge=1, le=1000, description="how often a training saves what it needs to go on")
    seed: int = Field(0, ge=0, lt=2**31, description="of the order of pairs and of the first weights")

    @property
    def effective_beta(self) -> float:
        """`beta`, or the default of the loss."""
        return self.beta if self.beta is not None else 0.1 if self.loss is Loss.DPO else 0.05

    @model_validator(mode="after")
    def _has_an_effect(self) -> TrainingConfig:
        for key, losses in {
            "beta": (Loss.ARM, Loss.DPO, Loss.PREFERENCE_ARM),
            "length_normalization": (Loss.ARM, Loss.PREFERENCE_ARM),
            "preference_rank": (Loss.PREFERENCE_ARM,),
            "concentration": (Loss.PREFERENCE_ARM,),
            "judge": (Loss.VALUE,),
        }.items():
            if self.loss not in losses and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with loss: {self.loss}")
        return self


class TrainClusterConfig(Section):
    """Where it runs. Nothing here changes results."""

    transport: Transport = Field(
        Transport.LOCAL, description="local: one objective after another; ray: each on an actor of its own"
    )
    address: str | None = Field(None, description="Ray address; null starts a local cluster")

    @model_validator(mode="after")
    def _has_an_effect(self) -> TrainClusterConfig:
        if self.address is not None and self.transport is not Transport.RAY:
            raise ValueError("address has no effect with transport: local; set transport: ray")
        return self


class AdaptersConfig(Section):
    """Where the adapters go: a folder for each objective below `path`."""

    path: str = Field(min_length=1, description="a local folder")


class TrainConfig(Section):
    """Principals to train: one LoRA adapter for each objective of the data, or one for all (preference_arm)."""

    input: PairsInputConfig
    output: AdaptersConfig
    base: Annotated[BaseConfig, BeforeValidator(model_from_name), AfterValidator(on_one_device)] = BaseConfig(
        model=EMBEDDED_MODEL
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    cluster: TrainClusterConfig = TrainClusterConfig()

    def fields(self) -> dict[str, Any]:
        """Every setting that changes results, by its dotted name, as plain values."""
        tree = self.model_dump(mode="json")
        left_out = {"input": ("path", "split", "subset", "system"), "training": ("device_batch_size",)}
        of_place = ("device", "resources", "model", "tensor_parallel", "pipeline_parallel", "sizes")
        base = {key: value for key, value in tree["base"].items() if key not in of_place}
        sections = {"base": base, "input": tree["input"], "training": tree["training"]}
        return {
            f"{section}.{key}": value
            for section, values in sections.items()
            for key, value in values.items()
            if key not in left_out.get(section, ())
        }
