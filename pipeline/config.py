"""Configuration: YAML and dotted overrides become one frozen, typed `Config`, once, at the edge.

Every default of the project lives here. An unknown key is an error with a suggestion.
"""

from __future__ import annotations

import difflib
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigurationError

EMBEDDED_MODEL = "smollm2-135m"
PRINCIPAL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class RuleName(StrEnum):
    EQUILIBRIUM = "equilibrium"
    LINEAR = "linear"
    MIXTURE = "mixture"
    MAXIMIN = "maximin"
    BASE = "base"


class Reproducibility(StrEnum):
    STRICT = "strict"
    RELAXED = "relaxed"


class Trace(StrEnum):
    NONE = "none"
    SUMMARY = "summary"
    TOKENS = "tokens"


class Transport(StrEnum):
    RAY = "ray"
    LOCAL = "local"


class Section(BaseModel):
    """A frozen section that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class InputConfig(Section):
    """Where the prompts are: Parquet, JSONL, OpenAI batch JSONL, a folder of them, or a `datasets` name."""

    path: str = Field(min_length=1, description="file, folder, s3:// or gs:// address, or a datasets name")
    prompt: str | None = Field(None, description="column with the prompt text")
    messages: str | None = Field(None, description="column with OpenAI messages")
    id: str | None = Field(None, description="column with a unique row id")
    weights: str | None = Field(None, description="column with {principal: weight} for the row")
    response: str | None = Field(None, description="column with an existing answer to compare with")
    limit: int | None = Field(None, ge=1, description="first rows only")
    split: str = Field("train", description="split, when path is a datasets name")
    subset: str | None = Field(None, description="configuration name, when path is a datasets name")

    @model_validator(mode="after")
    def _one_prompt_source(self) -> InputConfig:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("name either prompt or messages, not both")
        return self


class OutputConfig(Section):
    path: str = Field(min_length=1, description="the run directory, local or s3://")
    rows_per_shard: int = Field(256, ge=1, le=1_000_000, description="rows in one output file, the unit of commit")


class Resources(Section):
    """What Ray reserves for one host. `num_gpus: null` means one GPU where the device is a GPU."""

    num_cpus: float = Field(1, ge=0)
    num_gpus: float | None = Field(None, ge=0)


class ModelConfig(Section):
    """One set of weights."""

    model: str = Field(min_length=1, description=f"folder, hub id, s3:// folder, or {EMBEDDED_MODEL}")
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    resources: Resources = Resources()


class BaseConfig(ModelConfig):
    """The agent: the base LLM."""

    chat_template: str | None = Field(None, description="Jinja chat template instead of the tokenizer's own")


class ReferenceConfig(ModelConfig):
    """The reference model of a reward."""


def _model_from_name(value: Any) -> Any:
    """Accept a bare model name where a model section is expected."""
    return {"model": value} if isinstance(value, str) else value


def _reference_from_name(value: Any) -> Any:
    return value if value in ("backbone", "none") else _model_from_name(value)


class PrincipalConfig(Section):
    """What every principal has: its weight and its own prompt template."""

    weight: float = Field(1.0, ge=0)
    template: str | None = Field(
        None, description="Jinja chat template for this principal's prompt (messages, principle in scope)"
    )


class PromptedPrincipal(PrincipalConfig):
    """q(a) = log pi(a | principle, x) - log pi(a | x), by the base's weights or by `model`."""

    kind: Literal["prompted"]
    principle: str = Field(min_length=1, description="what the principal asks for, given as a system message")
    model: Annotated[ModelConfig | None, BeforeValidator(_model_from_name)] = None


class ArmPrincipal(PrincipalConfig):
    """q(a) = log pi_arm(a | x) - log pi_ref(a | x): an autoregressive reward model.

    `model` is a causal LM; or `adapter` a PEFT LoRA adapter on `model` (the base when not given). The reference is
    another model, "backbone" (the adapter's model without the adapter) or "none".
    """

    kind: Literal["arm"]
    model: Annotated[ModelConfig | None, BeforeValidator(_model_from_name)] = None
    adapter: str | None = None
    reference: Annotated[
        ReferenceConfig | Literal["backbone", "none"] | None, BeforeValidator(_reference_from_name)
    ] = None

    @model_validator(mode="after")
    def _complete(self) -> ArmPrincipal:
        if self.model is None and self.adapter is None:
            raise ValueError("kind arm needs a model, an adapter, or both")
        if self.reference == "backbone" and self.adapter is None:
            raise ValueError("reference: backbone needs an adapter; give a reference model or none")
        if self.reference is None and self.adapter is None:
            raise ValueError("kind arm without an adapter needs a reference: a model or none")
        return self


class TunedPairPrincipal(PrincipalConfig):
    """q(a) = log pi_model(a | x) - log pi_reference(a | x): for example a DPO policy and its reference."""

    kind: Literal["tuned_pair"]
    model: Annotated[ModelConfig, BeforeValidator(_model_from_name)]
    reference: Annotated[ReferenceConfig, BeforeValidator(_model_from_name)]


Principal = Annotated[PromptedPrincipal | ArmPrincipal | TunedPairPrincipal, Field(discriminator="kind")]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class DecodingConfig(Section):
    """How a row is decoded. Every field changes results and is part of the fingerprint."""

    rule: RuleName = RuleName.EQUILIBRIUM
    agent_temperature: float = Field(0.1, gt=0, description="tau, in nats of weighted reward")
    candidates: Annotated[int, Field(ge=1)] | Literal["all"] = Field(50, description="top-k of the base, or all")
    min_p: float = Field(0.0, ge=0, lt=1, description="drop candidates below min_p times the most likely one")
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0, description="of the final draw; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)] = ()
    n: int = Field(1, ge=1, le=1024, description="samples per prompt")
    seed: int = Field(0, ge=0, lt=2**63)
    reproducibility: Reproducibility = Reproducibility.STRICT
    trace: Trace = Trace.SUMMARY


class ClusterConfig(Section):
    """Where it runs. Nothing here changes results."""

    transport: Transport = Transport.RAY
    address: str | None = Field(None, description="Ray address; null starts a local cluster")
    replicas: int = Field(1, ge=1, le=4096)
    slots: int = Field(16, ge=1, le=4096, description="rows decoded at once per replica")
    coordinator_cpus: float = Field(0.5, ge=0)
    start_timeout_s: float = Field(600.0, gt=0, description="wait for resources and models")
    step_timeout_s: float = Field(300.0, gt=0, description="wait for one answer of a host")


def _budget(value: Any) -> Any:
    if isinstance(value, str):
        share = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*%", value)
        if share is not None and float(share[1]) <= 100:
            return value
        if re.fullmatch(r"[0-9]{1,18}", value):
            return int(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 10**18 and value % 1 == 0:
        return int(value)
    raise ValueError(f'budget is a number of rows, such as 10, or a share, such as "5%"; got {_short(value)}')


class ErrorsConfig(Section):
    budget: Annotated[int | str, BeforeValidator(_budget)] = Field("5%", description="rejected rows allowed")
    max_attempts: int = Field(3, ge=1, le=100, description="attempts of one shard")
    max_host_failures: int = Field(
        20, ge=0, description="hosts that may fail, one after another, while no row is finished in between"
    )

    def allowed(self, num_rows: int) -> int:
        """Number of rejected rows allowed among `num_rows`."""
        if isinstance(self.budget, int):
            return self.budget
        return int(num_rows * float(self.budget.rstrip("% ")) / 100)


class Config(Section):
    """One run."""

    input: InputConfig
    output: OutputConfig
    base: Annotated[BaseConfig, BeforeValidator(_model_from_name)] = BaseConfig(model=EMBEDDED_MODEL)
    principals: dict[str, Principal] = Field(default_factory=dict)
    decoding: DecodingConfig = DecodingConfig()
    cluster: ClusterConfig = ClusterConfig()
    errors: ErrorsConfig = ErrorsConfig()

    @model_validator(mode="after")
    def _principal_names(self) -> Config:
        for name in self.principals:
            if not PRINCIPAL_NAME.fullmatch(name):
                raise ValueError(
                    f"a principal's name has letters, digits, _ and -, and starts with a letter; got {name!r}"
                )
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {name: principal.weight for name, principal in self.principals.items()}


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply dotted overrides such as `decoding.temperature=0.7`, and validate.

    Raises:
        ConfigurationError: the file cannot be read, or a key or value is wrong; all of them, one a line.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: such as a date with a 13th month
        raise ConfigurationError(f"{path} is not valid YAML: {_printable(' '.join(str(error).split()))}") from None
    if not isinstance(tree, dict):
        raise ConfigurationError(
            f"{path} must hold a mapping with the keys input, output, ...; it holds {_printable(_short(tree))}"
        )
    return parse_config(tree, overrides, source=str(path))


def parse_config(
    tree: dict[str, Any], overrides: list[str] | None = None, *, source: str = "configuration"
) -> Config:
    """Apply overrides to a plain tree of values and validate it. Raises ConfigurationError, a fault a line."""
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = [_printable(_describe(fault, tree)) for fault in error.errors()]
        raise ConfigurationError(f"{source}: " + "\n".join(dict.fromkeys(faults))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigurationError(f"an override has the form key.sub=value; got {override!r}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigurationError(f"the value of the override {override!r} is not valid YAML") from None
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if isinstance(child, str) and key in ("base", "model", "reference"):
            child = node[key] = {"model": child}
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigurationError(f"override {override!r}: {key} is {child!r}, which has no keys below it")
        node = child
    node[keys[-1]] = value


def _describe(fault: Any, tree: dict[str, Any]) -> str:
    """One line: where, what was given, what would be right."""
    where, section = _locate(fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = sorted(section.model_fields) if section is not None else []
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"
        return f"{where} is not a known key{hint}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{where}.kind must be one of prompted, arm, tuned_pair; got {_short(_value_of(fault, 'kind'))}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("String should", "must")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} {message}; got {_short(fault['input'])}"


def _value_of(fault: Any, key: str) -> Any:
    return fault["input"].get(key) if isinstance(fault["input"], dict) else fault["input"]


def _printable(text: str) -> str:
    """The text on one line, control characters escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _locate(loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The dotted place of a fault, without the union tags that pydantic adds, and its section's class."""
    kinds: dict[str, type[BaseModel]] = {
        "prompted": PromptedPrincipal,
        "arm": ArmPrincipal,
        "tuned_pair": TunedPairPrincipal,
    }
    section: type[BaseModel] | None = Config
    names: list[str] = []
    for index, part in enumerate(loc):
        if index == 2 and loc[0] == "principals" and part in kinds:
            section = kinds[str(part)]
            continue
        if isinstance(part, str) and re.fullmatch(
            r"(ReferenceConfig|ModelConfig|literal\[.*\]|constrained-.*|int|str|function-.*)", part
        ):
            continue
        names.append(str(part))
        if index < len(loc) - 1:
            section = _child_section(section, str(part)) or section
    return ".".join(names), section


def _child_section(section: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    children: dict[str, type[BaseModel]] = {
        "input": InputConfig,
        "output": OutputConfig,
        "base": BaseConfig,
        "decoding": DecodingConfig,
        "cluster": ClusterConfig,
        "errors": ErrorsConfig,
        "resources": Resources,
        "model": ModelConfig,
        "reference": ReferenceConfig,
    }
    return children.get(key) if section is not None else None
