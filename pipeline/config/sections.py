"""The sections of a configuration: frozen, typed, with every default of the project.

`pipeline.config.files` makes them out of YAML and dotted overrides, once, at the edge.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cage.rule_names import RuleName
from pipeline.config.drafts import Draft, DraftModel, DraftSource, check_draft, why_not_drafted
from pipeline.config.units import Unit, check_one_reward_model, check_options, check_principals, check_rules
from pipeline.principals.kinds import Principal
from pipeline.protocol.specs import SamplingOptions
from pipeline.sections import EMBEDDED_MODEL, BaseConfig, Section, model_from_name, shortened

PRINCIPAL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


FIRST_AUTO_SLOTS = 8
MAX_PRINCIPALS = 1024


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


InputFormat = Literal[
    "auto",
    "ultrafeedback",
    "ultrafeedback-binarized",
    "ultrafeedback-preferences",
    "helpsteer2",
    "pku-saferlhf",
    "sharegpt",
    "alpaca",
    "hh-rlhf",
]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class InputConfig(Section):
    """Where the prompts are: Parquet, JSONL, OpenAI batch JSONL, a folder of them, or a `datasets` name."""

    path: str = Field(min_length=1, description="file, folder, s3:// or gs:// address, or a datasets name")
    prompt: str | None = Field(None, description="column with the prompt: a text, or a list of messages")
    messages: str | None = Field(None, description="column with conversations: lists of messages, or JSON text")
    format: InputFormat = Field(
        "auto", description="of the records; auto: recognised by their columns, where prompt and messages are not set"
    )
    last_assistant: Literal["response", "prefill", "error"] | None = Field(
        None,
        description="what the assistant's message at the end of a conversation is: the existing answer, or the "
        "beginning of the new one; null: response where one of the first 100 rows ends so",
    )
    id: str | None = Field(None, description="column with a unique row id")
    weights: str | None = Field(None, description="column with {principal: weight} for the row")
    response: str | None = Field(None, description="column with an existing answer to compare with")
    candidates: str | None = Field(
        None,
        description="column with a list of answers, or of {text, weight}: what the row's game is about, in place of "
        "answers that the base draws (unit answer); weights make the base policy, which is uniform without them",
    )
    tools: str | None = Field(
        None,
        description="column with tools that the model may call; null: tools, where messages have such a column",
    )
    chat_template_kwargs: str | None = Field(
        None,
        description="column with an object of values that the row's chat templates read besides the messages, in "
        "place of base.chat_template_kwargs key by key; null: chat_template_kwargs, where there is such a column",
    )
    keep: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_list)] | Literal["all"] = (
        Field((), description="columns that are carried into the output as they are: a list of names, or all")
    )
    limit: int | None = Field(None, ge=1, description="first rows only")
    allow_special_tokens: bool = Field(
        False, description="read special tokens that messages and answers spell, such as <|im_end|>, as tokens"
    )
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


Finite = Annotated[float, Field(allow_inf_nan=False)]
Marker = Annotated[str, Field(min_length=1)]


class ThinkingConfig(Section):
    """How the reasoning of a model that reasons before it answers is treated."""

    markers: Literal["auto", "none"] | tuple[Marker, Marker] = Field(
        "auto",
        description="what the base writes before and after its reasoning, as [start, end]; auto: found in its chat "
        "template or tokenizer; none: reasoning is part of the answer",
    )
    steer: bool = Field(True, description="whether principals steer the reasoning; false: the base alone draws it")
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="tokens of reasoning after which its end is written in the model's place; null: no limit",
    )
    in_answers: bool = Field(
        False,
        description="whether response, completion, messages, chosen, rejected and rewards contain the reasoning with "
        "its markers, and so what judges and filters read; it is a column of its own in any case",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> ThinkingConfig:
        if self.markers == "none" and (self.in_answers or self.max_tokens is not None or not self.steer):
            raise ValueError("with markers: none, steer, max_tokens and in_answers have no effect; leave them out")
        return self

    @property
    def is_default(self) -> bool:
        return self == ThinkingConfig()


class DecodingConfig(Section):
    """How a row is decoded. Every field but those of drafts changes results and is part of the fingerprint."""

    rule: RuleName = Field(RuleName.EQUILIBRIUM, description="how base and principals become one policy")
    agent_temperature: float = Field(0.1, gt=0, description="tau, in nats of weighted reward")
    unit: Unit = Field(
        Unit.TOKEN,
        description="what a game is about: the next token, the next block of the answer, or the whole answer; "
        "grid.units compares several",
    )
    proposals: int = Field(
        8, ge=2, le=1024, description="blocks or answers that the base draws for each game (unit block or answer)"
    )
    block_tokens: int = Field(16, ge=1, description="tokens of a block (unit block)")
    block_end: Literal["tokens", "sentence"] = Field(
        "tokens",
        description="where a block ends: after block_tokens, or earlier at the end of a sentence or line",
    )
    proposals_by: RuleName = Field(
        RuleName.BASE,
        description="what draws the proposals, token by token: the base, or games over tokens by this rule (unit "
        "block or answer)",
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="nats per token by which the policy is to leave the base: the agent temperature of a row follows "
        "its own KL so far, beginning at agent_temperature; null keeps it as it is",
    )
    soft_threshold: Finite | dict[str, Finite] = Field(
        1.0,
        description="for rule soft_threshold: agent temperatures above its mean under the base that a value must be "
        "to count; one number, or one for each principal",
    )
    candidates: Annotated[int, Field(ge=1)] | Literal["all"] = Field(50, description="top-k of the base, or all")
    min_p: float = Field(0.0, ge=0, lt=1, description="drop candidates below min_p times the most likely one")
    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens, reasoning included")
    temperature: float = Field(1.0, ge=0, description="of the final draw; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="the final draw is from the fewest tokens with this mass")
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_list)] = Field(
        (), description="texts that end an answer and are no part of it; special tokens among them stop, too"
    )
    n: int = Field(1, ge=1, le=1024, description="samples per prompt")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of all draws, which are keyed by it, the row's id and the sample"
    )
    reproducibility: Reproducibility = Field(
        Reproducibility.STRICT,
        description="strict: a row's bits depend on nothing but the row, these settings and the kind of machine; "
        "relaxed: faster on some machines",
    )
    draft: Draft = Field(
        "auto",
        description="where several tokens at once are proposed from, which one pass verifies; changes no result. A "
        "list in order of preference: response (input.response), siblings (other answers to the prompt), lookup (the "
        "prompt and the answer so far), model (draft_model). auto: all of them, on a CPU, or wherever there is a "
        "draft_model; off: none. Fewer are proposed, or none, where they would take longer than they save",
    )
    draft_model: DraftModel | None = Field(
        None, description="what proposes tokens for source model: a name, or a section; changes no result"
    )
    trace: Trace = Field(
        Trace.SUMMARY, description="numbers by answer (summary), also by token (tokens), or rewards alone (none)"
    )
    thinking: ThinkingConfig = ThinkingConfig()

    @property
    def asks_for_drafts(self) -> bool:
        """Whether drafts were asked for, and not only allowed."""
        return self.draft_model is not None or self.draft not in ("auto", "off")

    @model_validator(mode="after")
    def _leaves_room(self) -> DecodingConfig:
        limit = self.thinking.max_tokens
        if limit is not None and limit >= self.max_new_tokens:
            raise ValueError(
                f"thinking.max_tokens must be below max_new_tokens ({self.max_new_tokens}), or no answer fits behind "
                f"the reasoning; got {limit}"
            )
        return self

    @property
    def sampling(self) -> SamplingOptions:
        """How candidates are chosen and tokens drawn."""
        count = None if self.candidates == "all" else self.candidates
        return SamplingOptions(count, self.min_p, self.temperature, self.top_p)

    @property
    def draw(self) -> tuple[float, float]:
        """Temperature and top_p of the draw from a game's policy."""
        return self.temperature, self.top_p


class SimplexConfig(Section):
    """Every weight vector whose entries are multiples of `step` and sum to 1."""

    step: float = Field(gt=0, le=1, description="such as 0.25; 1 must be a multiple of it")

    @model_validator(mode="after")
    def _divides_one(self) -> SimplexConfig:
        if abs(1 / self.step - round(1 / self.step)) > 1e-6:
            raise ValueError(f"1 must be a multiple of step; got {self.step:g}")
        return self


Weight = Annotated[float, Field(ge=0)]


class GridConfig(Section):
    """Ways to answer every prompt: each rule over each unit at each agent temperature with each weight vector.

    What is left empty is taken from `decoding` and `principals`. All of it is part of the fingerprint.
    """

    weights: tuple[dict[str, Weight], ...] | SimplexConfig = Field(
        (), description="weight vectors {principal: weight}, or {step: 0.25} for a grid on the simplex"
    )
    rules: tuple[RuleName, ...] = Field((), description="each answers every prompt; empty: decoding.rule")
    units: tuple[Unit, ...] = Field(
        (),
        description="what games are about: every rule is played over each of them that it is for; empty: "
        "decoding.unit",
    )
    agent_temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="in nats of weighted reward; empty: decoding.agent_temperature"
    )
    draw_temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (), description="of the final draw; empty: decoding.temperature"
    )

    @property
    def is_empty(self) -> bool:
        return not any(getattr(self, name) for name in type(self).model_fields)


MAX_REPLICAS = 4096


class ReplicaRange(Section):
    """How many replicas there may be, on a cluster whose machines come and go."""

    min: int = Field(
        1, ge=1, le=MAX_REPLICAS, description="the run ends where the cluster holds fewer for start_timeout_s"
    )
    max: int = Field(ge=1, le=MAX_REPLICAS, description="asked of the cluster, which may grow for them")

    @model_validator(mode="after")
    def _is_a_range(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min must not be above max; got min {self.min} and max {self.max}")
        return self


class ClusterConfig(Section):
    """Where it runs. Nothing here changes results."""

    transport: Transport = Field(Transport.RAY, description="over Ray, or local: one process without Ray")
    address: str | None = Field(None, description="Ray address; null starts a local cluster")
    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | ReplicaRange = Field(
        1,
        description="copies of all hosts, which share the shards; {min: 1, max: 8}: as many of 8 as the cluster "
        "holds, while machines come and go",
    )
    slots: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        16, description="rows decoded at once per replica; auto: as many as there is memory for"
    )
    coordinator_cpus: float = Field(0.5, ge=0, description="CPU cores that Ray reserves for a coordinator")
    start_timeout_s: float = Field(600.0, gt=0, description="wait for resources and models")
    step_timeout_s: float = Field(300.0, gt=0, description="wait for one answer of a host")
    stall_timeout_s: float = Field(
        3600.0, gt=0, description="end a run in which no row is finished and no token drawn for so long"
    )

    @property
    def replica_range(self) -> ReplicaRange:
        """How few and how many replicas there may be; a number is both."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas
        return ReplicaRange(min=self.replicas, max=self.replicas)

    @property
    def first_slots(self) -> int:
        """Slots that a host has when it starts; with `auto` it is asked then how many fit."""
        return FIRST_AUTO_SLOTS if self.slots == "auto" else self.slots


def _budget(value: Any) -> Any:
    if isinstance(value, str):
        share = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*%", value)
        if share is not None and float(share[1]) <= 100:
            return value
        if re.fullmatch(r"[0-9]{1,18}", value):
            return int(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 10**18 and value % 1 == 0:
        return int(value)
    raise ValueError(f'budget is a number of rows, such as 10, or a share, such as "5%"; got {shortened(value)}')


class ErrorsConfig(Section):
    budget: Annotated[int | str, BeforeValidator(_budget)] = Field("5%", description="failed rows allowed")
    stop_when_all_fail: float | None = Field(
        0.5,
        gt=0,
        le=1,
        description="end the run when no row was answered and this share of the first shard, and at least 8 rows, "
        "failed for one reason; null: never",
    )
    max_attempts: int = Field(3, ge=1, le=100, description="attempts of one shard")
    max_host_failures: int = Field(
        20, ge=0, description="hosts that may fail, one after another, while no row is finished in between"
    )

    def allowed(self, num_rows: int) -> int:
        """Number of failed rows allowed among `num_rows`."""
        if isinstance(self.budget, int):
            return self.budget
        return int(num_rows * float(self.budget.rstrip("% ")) / 100)


class Config(Section):
    """One run."""

    input: InputConfig
    output: OutputConfig
    base: Annotated[BaseConfig, BeforeValidator(model_from_name)] = BaseConfig(model=EMBEDDED_MODEL)
    principals: dict[str, Principal] = Field(default_factory=dict, max_length=MAX_PRINCIPALS)
    decoding: DecodingConfig = DecodingConfig()
    grid: GridConfig = GridConfig()
    cluster: ClusterConfig = ClusterConfig()
    errors: ErrorsConfig = ErrorsConfig()

    @model_validator(mode="after")
    def _principal_names(self) -> Config:
        for name in self.principals:
            if not PRINCIPAL_NAME.fullmatch(name):
                raise ValueError(
                    "a principal's name has at most 64 letters (a to z), digits, _ and -, and starts with a letter "
                    f"or _, because columns of the output are named by it; got {shortened(name)}"
                )
        by_folded: dict[str, str] = {}
        for name in self.principals:  # many readers of Parquet do not distinguish upper and lower case
            if (other := by_folded.setdefault(name.casefold(), name)) != name:
                raise ValueError(
                    f"principals' names must differ in more than upper and lower case; got {other}, {name}"
                )
        return self

    @property
    def units(self) -> tuple[Unit, ...]:
        """What games of the run are about."""
        return tuple(dict.fromkeys(self.grid.units or (self.decoding.unit,)))

    @property
    def rules(self) -> tuple[RuleName, ...]:
        """The rules by which answers are chosen, and proposals drawn."""
        by = () if self.units == (Unit.TOKEN,) else (self.decoding.proposals_by,)
        return tuple(dict.fromkeys([*(self.grid.rules or (self.decoding.rule,)), *by]))

    @model_validator(mode="after")
    def _units_fit(self) -> Config:
        decoding, thinking = self.decoding, self.decoding.thinking
        # a default that is written out, as --print-config does, asks for nothing
        fields = type(decoding).model_fields
        given = {f"decoding.{name}" for name in fields if getattr(decoding, name) != fields[name].default}
        if thinking.max_tokens is not None:
            given.add("decoding.thinking.max_tokens")
        if not thinking.steer:
            given.add("decoding.thinking.steer")
        if self.input.candidates is not None:
            given.add("input.candidates")
        check_options(self.units, given)
        check_principals(self.units, self.principals, "grid.units" if self.grid.units else "decoding.unit")
        check_rules(
            self.units, self.grid.rules or (decoding.rule,), "grid.rules" if self.grid.rules else "decoding.rule"
        )
        check_rules((Unit.TOKEN,), (decoding.proposals_by,), "decoding.proposals_by")
        if any(rule.at_weights for rule in self.rules):
            check_one_reward_model(self.principals)
        return self

    @model_validator(mode="after")
    def _thresholds_fit(self) -> Config:
        given = self.decoding.soft_threshold
        if isinstance(given, dict) and set(given) != set(self.principals):
            known, named = (", ".join(names) or "none" for names in (self.principals, given))
            raise ValueError(f"decoding.soft_threshold must name every principal once ({known}); got {named}")
        return self

    @model_validator(mode="after")
    def _options_have_effect(self) -> Config:
        decoding, rules = self.decoding, self.rules
        default = type(decoding).model_fields["soft_threshold"].default
        if decoding.soft_threshold != default and not any(rule.takes_k for rule in rules):
            raise ValueError("decoding.soft_threshold: no effect without rule: soft_threshold")
        if decoding.target_kl is not None and not (self.principals and any(rule.uses_temperature for rule in rules)):
            raise ValueError("decoding.target_kl: no effect where no principal steers; leave it out")
        is_one_game = self.units == (Unit.ANSWER,) and not decoding.proposals_by.uses_temperature
        if decoding.target_kl is not None and is_one_game:
            raise ValueError("decoding.target_kl: no effect with unit: answer, which is one game; leave it out")
        return self

    @property
    def undrafted(self) -> tuple[str, ...]:
        """Why no tokens are proposed, as far as settings say; empty where none keeps them from it."""
        decoding = self.decoding
        return why_not_drafted(
            decoding.draft,
            self.units,
            decoding.target_kl,
            depends=decoding.reproducibility is Reproducibility.RELAXED and not decoding.asks_for_drafts,
        )

    @property
    def has_existing(self) -> bool:
        """Whether rows come with answers."""
        return self.input.response is not None or self.input.last_assistant is not None

    @property
    def has_siblings(self) -> bool:
        """Whether a prompt has several answers."""
        return self.decoding.n > 1 or not self.grid.is_empty

    @property
    def draft_sources(self) -> tuple[DraftSource, ...]:
        """Where proposed tokens come from; empty where none are proposed."""
        draft = self.decoding.draft
        if self.undrafted:
            return ()
        known = (each for each in DraftSource if each is not DraftSource.MODEL or self.decoding.draft_model)
        return tuple(known if isinstance(draft, str) else draft)

    @model_validator(mode="after")
    def _drafts_fit(self) -> Config:
        check_draft(
            self.decoding.draft,
            self.undrafted,
            has_existing=self.has_existing,
            has_siblings=self.has_siblings,
            has_model=self.decoding.draft_model is not None,
        )
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> Config:
        if isinstance(self.grid.weights, SimplexConfig):
            if not self.principals:
                raise ValueError("grid.weights needs principals to weigh, and there are none")
        else:
            for index, vector in enumerate(self.grid.weights):
                if set(vector) != set(self.principals):
                    known, given = (", ".join(names) or "none" for names in (self.principals, vector))
                    raise ValueError(f"grid.weights[{index}] must name every principal once ({known}); got {given}")
        if self.grid.weights and self.input.weights is not None:
            raise ValueError("give either input.weights or grid.weights, not both")
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {name: principal.weight for name, principal in self.principals.items()}
