"""What a replica will be made of: models found, hosts laid out and everything checked that their files say.

Nothing here imports torch or transformers: a plan is shown, and what cannot work is refused, within a second.
`pipeline.runtime.assembly` loads what a run needs besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pipeline.config.sections import Config, Reproducibility, Transport
from pipeline.config.units import Unit
from pipeline.config.variants import Variant, draws_of, lay_out, sampling_of
from pipeline.errors import ConfigurationError
from pipeline.hub.chat_templates import PromptTemplate
from pipeline.hub.families import PLAIN, REFUSED, Expected, expect
from pipeline.hub.model_facts import ModelFacts, read_model_facts
from pipeline.hub.packages import check_device
from pipeline.hub.reasoning import ReasoningFormat, find_reasoning
from pipeline.hub.sources import AdapterSource, ModelSource, resolve_adapter, resolve_configured
from pipeline.hub.tokenizer_facts import TokenizerFacts, read_tokenizer_facts
from pipeline.hub.tokenizers import compare_tokenizers, share_tokens, special_stop_ids, stop_token_ids
from pipeline.hub.weight_files import CONFIG, TRAINING_FACTS, LocalTree, read_json
from pipeline.protocol.specs import GameSpec, HostSpec
from pipeline.protocol.topology import BASE, HostPlan, Topology
from pipeline.runtime.drafts import (
    PLACE,
    draft_section,
    naming_draft_model,
    specify_draft,
    where_drafted,
    why_not_drafted,
)
from pipeline.runtime.prompt_templates import end_of_answer, plan_templates
from pipeline.runtime.reward_specs import specify_reward, specify_text
from pipeline.runtime.splits import check_split
from pipeline.runtime.topology import adapters_of, build_topology, models_of
from pipeline.sections import ModelConfig


@dataclass(frozen=True, slots=True)
class ResolvedModels:
    """The models and adapters of a configuration.

    Args:
        models: by their dotted places in the configuration.
        adapters: likewise.
        draft: the model that proposes tokens; None where none does. It changes no result, so it has no identity.
    """

    models: Mapping[str, ModelSource]
    adapters: Mapping[str, AdapterSource]
    draft: ModelSource | None = None

    @property
    def identities(self) -> dict[str, str]:
        """Every model and adapter by content."""
        identities = {place: model.identity for place, model in self.models.items()}
        return identities | {place: adapter.identity for place, adapter in self.adapters.items()}


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """A replica before anything of it is loaded.

    Args:
        config: of the run.
        topology: roles and hosts.
        hosts: how to start each host, in the topology's order; those of `read_text` lack what reads the base's tokens
            for them.
        read_text: names of the hosts whose model has tokens of its own, and so reads answers as text.
        identities: every model and adapter by content, by its dotted place in the configuration.
        facts: of each host's model, by host name.
        tokenizers: of each host's tokenizer, by host name.
        templates: how prompts are written, by role.
        template_time: the time that chat templates are given; None where the configuration states it or none asks.
        stop_ids: token ids that end an answer.
        end_id: the token that follows a finished answer; None where there is none.
        variants: the ways to answer a row.
        expected: how each host's model will be decoded, by host name; models that score branches are left out.
        reasoning: how the base marks its reasoning; None where it does not reason.
        undrafted: why no tokens are proposed; empty where they are, or a host's device decides.
        masked: tokens by id that a host's model has and the base has not, or the reverse, by host name; no answer has
            them.
        draft: how to start the model that proposes tokens; None where none does.
    """

    config: Config
    topology: Topology
    hosts: tuple[HostSpec, ...]
    read_text: frozenset[str]
    identities: Mapping[str, str]
    facts: Mapping[str, ModelFacts]
    tokenizers: Mapping[str, TokenizerFacts]
    templates: Mapping[str, PromptTemplate]
    template_time: datetime | None
    stop_ids: frozenset[int]
    end_id: int | None
    variants: tuple[Variant, ...]
    expected: Mapping[str, Expected]
    reasoning: ReasoningFormat | None
    undrafted: tuple[str, ...]
    masked: Mapping[str, Mapping[int, str]]
    draft: HostSpec | None = None

    @property
    def foreign_adapters(self) -> list[str]:
        """A sentence for each adapter that says that it was trained on a model of another name."""
        pairs = [(adapter, host.source) for host in self.hosts for adapter in host.adapters.values()]
        found = [why for adapter, model in pairs if (why := adapter.why_foreign(model)) is not None]
        return list(dict.fromkeys(found))


def resolve_models(
    config: Config, cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None
) -> ResolvedModels:
    """Find every model and adapter; configurations and tokenizers of models elsewhere are fetched.

    Args:
        config: of the run.
        cache_folder: where files are kept that are fetched.
        progress: called with a line for every file that is fetched or made.

    Raises:
        ConfigurationError: one is missing, or cannot be used.
    """
    models = {place: resolve_configured(model, cache_folder, progress=progress) for place, model in models_of(config)}
    adapters = {
        place: resolve_adapter(path, cache_folder=cache_folder, progress=progress)
        for place, path in adapters_of(config)
    }
    draft = None
    if (section := draft_section(config)) is not None:
        with naming_draft_model():
            draft = resolve_configured(section, cache_folder, progress=progress)
    return ResolvedModels(models, adapters, draft)


def plan_replica(
    config: Config, resolved: ResolvedModels, cache_folder: Path, *, now: datetime | None = None
) -> ReplicaPlan:
    """Compare vocabularies and lay out hosts.

    Args:
        config: of the run.
        resolved: its models and adapters.
        cache_folder: where the hosts keep weights that they fetch.
        now: the time that chat templates are given where the configuration states none; None: that of this call.

    Raises:
        ConfigurationError: a model is not of the kind that it is used as, or a
            chat template cannot do what is asked of it.
    """
    source_of = {model.model_dump_json(): resolved.models[place] for place, model in models_of(config)}
    tokens = _Tokens(source_of, config.base)
    topology = build_topology(
        config,
        identify=lambda model: source_of[model.model_dump_json()].identity,
        reads_text=tokens.differ,
    )
    sources = {plan.name: source_of[plan.model.model_dump_json()] for plan in topology.hosts}
    tokenizers = {name: tokens.of(source) for name, source in sources.items()}
    facts = {name: read_model_facts(source) for name, source in sources.items()}
    adapter_of = {path: resolved.adapters[place] for place, path in adapters_of(config)}
    now = now or datetime.now().replace(microsecond=0)
    templates = plan_templates(config, topology, tokenizers, config.base.chat_template_time or now)
    is_given_time = config.base.chat_template_time is None and any(each.reads_clock for each in templates.values())
    end_id = end_of_answer(templates[BASE], tokenizers[BASE])
    stop_ids = stop_token_ids(sources[BASE], tokenizers[BASE], facts[BASE]) | (set() if end_id is None else {end_id})
    stop_ids |= special_stop_ids(config.decoding.stop, tokenizers[BASE])
    read_text = frozenset(plan.name for plan in topology.hosts if plan.reads_text)
    masked = _masked_tokens(topology, tokenizers, stop_ids)
    vocab_size = min(
        [
            max(tokenizers[BASE].token_by_id, default=-1) + 1,
            *(facts[name].vocab_size for name in facts if name not in read_text),
            *(token_id for tokens in masked.values() for token_id in tokens),
        ]
    )
    _check_ends(end_id, stop_ids, vocab_size, {name: facts[name].vocab_size for name in facts}, tokenizers[BASE])
    holes = tuple(each for each in range(vocab_size) if each not in tokenizers[BASE].token_by_id)
    variants = lay_out(config)
    for plan in topology.hosts:
        check_split(plan, sources[plan.name])
    expected = {plan.name: _expect(plan, sources[plan.name]) for plan in topology.hosts if not plan.scores_branches}
    undrafted = why_not_drafted(config, topology, sources, expected)
    draft = None
    if resolved.draft is not None and not undrafted:
        section = draft_section(config)
        if section is not None and section.device == "cpu":
            check_device(resolved.draft.needs, f"{PLACE}: {resolved.draft.name}", capability=None)
        with naming_draft_model():
            facts_of_draft = tokens.of(resolved.draft)
        draft = specify_draft(
            config, resolved.draft, tokenizers[BASE], facts_of_draft, vocab_size, stop_ids, cache_folder
        )

    for plan in topology.hosts:
        sees_no_gpu = config.cluster.transport is Transport.RAY and plan.model.resources.num_gpus == 0
        if plan.model.device == "cpu" or sees_no_gpu:
            check_device(sources[plan.name].needs, sources[plan.name].name, capability=None)

    def specify(plan: HostPlan) -> HostSpec:
        return HostSpec(
            name=plan.name,
            serves=plan.serves,
            source=sources[plan.name],
            dtype=plan.model.dtype,
            device=plan.model.device,
            attention=plan.model.attention,
            tensor_parallel=plan.model.tensor_parallel,
            pipeline_parallel=plan.model.pipeline_parallel,
            roles=plan.roles,
            num_slots=config.cluster.first_slots,
            vocab_size=vocab_size,
            strict=config.decoding.reproducibility is Reproducibility.STRICT,
            cache_folder=cache_folder,
            adapters={
                name: _use_adapter(adapter_of[path], plan, name, sources[plan.name])
                for name, path in plan.adapters.items()
            },
            reward=specify_reward(
                plan,
                topology,
                config,
                tokenizers,
                facts[plan.name],
                sources[plan.name],
                {name: adapter_of[path] for name, path in plan.adapters.items()},
            ),
            text=specify_text(plan, topology, config, tokenizers),
            games=_games(config, topology, variants),
            holes=holes,
            drafts=where_drafted(config, undrafted),
        )

    return ReplicaPlan(
        config=config,
        topology=topology,
        hosts=tuple(map(specify, topology.hosts)),
        read_text=read_text,
        identities=resolved.identities,
        facts=facts,
        tokenizers=tokenizers,
        templates=templates,
        template_time=now if is_given_time else None,
        stop_ids=stop_ids,
        end_id=end_id,
        variants=variants,
        expected=expected,
        reasoning=_reasoning(config, templates[BASE].text, tokenizers[BASE]),
        undrafted=undrafted,
        masked={name: tokens for name, tokens in masked.items() if tokens},
        draft=draft,
    )


def _use_adapter(adapter: AdapterSource, plan: HostPlan, name: str, source: ModelSource) -> AdapterSource:
    """The adapter at the preference vector that its principal asks for, if it depends on one.

    Raises:
        ConfigurationError: it was trained on another model, the kind of the principal is not for it, or it has no
            such objective.
    """
    own, other = adapter.trained_on, source.identity
    # of one way to name content: a model on the hub and its copy in a folder have other names
    if own is not None and own != other and own.partition(":")[0] == other.partition(":")[0]:
        raise ConfigurationError(
            f"adapter {adapter.name} was trained on {adapter.backbone}, whose content is not that of "
            f"{source.name}; name its model (delete {TRAINING_FACTS} beside it if the models are alike)"
        )
    form = adapter.form
    if name not in plan.objectives:
        if form is not None:
            raise ConfigurationError(
                f"adapter {adapter.name} depends on a preference vector (peft_type PBLORA): use it with kind "
                f"preference_arm and one of its objectives, {', '.join(form.objectives)}"
            )
        return adapter
    if form is None:
        raise ConfigurationError(
            f"adapter {adapter.name} depends on no preference vector, so kind preference_arm is not for it; use arm"
        )
    of_roles = [objective for role in plan.roles if role.adapter == name for objective, _ in role.preference]
    objective = plan.objectives[name]
    for wanted in [*of_roles, *([] if objective is None else [objective])]:
        if form.index(wanted) is None:
            raise ConfigurationError(
                f"adapter {adapter.name} has no objective {wanted}; it has {', '.join(form.objectives)}"
            )
    if objective is None and plan.reads_text:
        raise ConfigurationError(
            f"preference: weights, or rule parm, needs the base's tokens, and {plan.model.model} has others; use "
            "preference: unit and other rules"
        )
    return replace(adapter, objective=None if objective is None else form.index(objective))


def _expect(plan: HostPlan, source: ModelSource) -> Expected:
    """How a language model will be decoded.

    Raises:
        ConfigurationError: its configuration says that it cannot be, or not in slots where that is asked for.
    """
    config = read_json(LocalTree(Path(source.path)), CONFIG)
    expected = expect(config)
    where = f"{source.name} (for {', '.join(plan.serves)}), architecture {config.get('model_type')}"
    if expected.decoding == REFUSED:
        raise ConfigurationError(f"{where}, cannot be decoded: {expected.reason}")
    if expected.decoding == PLAIN and plan.model.attention == "slots":
        raise ConfigurationError(
            f"{where}, is not decoded in slots: {expected.reason}; with attention: auto it is decoded one row at a "
            "time"
        )
    return replace(expected, decoding=PLAIN, reason=None) if plan.model.attention == "plain" else expected


def _check_ends(
    end_id: int | None,
    stop_ids: frozenset[int],
    vocab_size: int,
    rows_by_host: Mapping[str, int],
    tokenizer: TokenizerFacts,
) -> None:
    """Refuse models that could not end an answer: their embeddings lack the token for it."""
    if end_id is not None and end_id >= vocab_size:
        beyond = {end_id}
    elif stop_ids and min(stop_ids) >= vocab_size:
        beyond = set(stop_ids)
    else:
        return
    shown = ", ".join(f"{tokenizer.token_by_id.get(each)!r} (id {each})" for each in sorted(beyond))
    host = min(rows_by_host, key=lambda name: rows_by_host[name])
    raise ConfigurationError(
        f"the token that ends an answer, {shown}, is beyond the embedding of {host}, which has "
        f"{rows_by_host[host]:,} rows: the tokenizer has tokens that the model was not resized for"
    )


def _reasoning(config: Config, template: str | None, tokenizer: TokenizerFacts) -> ReasoningFormat | None:
    """How the base marks its reasoning. Raises ConfigurationError where settings of it would have no effect."""
    thinking = config.decoding.thinking
    if thinking.markers == "none":
        return None
    if thinking.markers != "auto":
        return ReasoningFormat(*thinking.markers)
    found = find_reasoning(template, tokenizer)
    if found is None and not thinking.is_default:
        raise ConfigurationError(
            "decoding.thinking has no effect: neither the chat template nor the tokenizer of the base has markers of "
            "reasoning, such as <think>; name them with decoding.thinking.markers: [start, end]"
        )
    return found


class _Tokens:
    """Which models have the base's tokens.

    Args:
        source_of: resolved models by their sections as JSON.
        base: the base's section.
    """

    def __init__(self, source_of: Mapping[str, ModelSource], base: ModelConfig) -> None:
        self._source_of = source_of
        self._facts: dict[str, TokenizerFacts] = {}
        source = source_of[base.model_dump_json()]
        self._base = self.of(source)
        self._ends = stop_token_ids(source, self._base, read_model_facts(source))

    def of(self, source: ModelSource) -> TokenizerFacts:
        """The facts of a model's tokenizer, which are read once."""
        if source.path not in self._facts:
            self._facts[source.path] = read_tokenizer_facts(source)
        return self._facts[source.path]

    def differ(self, model: ModelConfig, scores: bool) -> bool:
        """Whether a model reads answers as text: a reward model with any other token, a language model with tokens
        that answers cannot do without."""
        own = self.of(self._source_of[model.model_dump_json()])
        if scores:
            return not share_tokens(self._base, own)
        try:
            compare_tokenizers(self._base, own, BASE, model.model, ends=self._ends)
        except ConfigurationError:
            return True
        return False


def _masked_tokens(
    topology: Topology, tokenizers: Mapping[str, TokenizerFacts], ends: frozenset[int]
) -> dict[str, dict[int, str]]:
    """Tokens that answers do without, by host. Raises ConfigurationError where vocabularies differ by others."""
    return {
        plan.name: compare_tokenizers(
            tokenizers[BASE], tokenizers[plan.name], BASE, f"{plan.name} ({plan.model.model})", ends=ends
        )
        for plan in topology.hosts[1:]
        if not plan.scores_branches
    }


def _games(config: Config, topology: Topology, variants: tuple[Variant, ...]) -> GameSpec | None:
    """What a lone host needs to sample; None where several hosts work together."""
    if len(topology.hosts) > 1:
        return None
    decoding = config.decoding
    # of blocks and answers hosts draw the proposals; the coordinator solves their games
    rules = {variant.rule if variant.unit is Unit.TOKEN else decoding.proposals_by for variant in variants}
    sampling = sampling_of(decoding, variants)
    alike = draws_of(decoding, variants) == {(sampling.temperature, sampling.top_p)}
    return GameSpec(sampling, topology.principals, frozenset(rules), draws_alike=alike)
