"""Whether the tokens of a run are drafted, as far as its configuration and its models' files show."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.drafts import DraftSource
from pipeline.config.sections import Config, Transport
from pipeline.errors import ConfigurationError
from pipeline.hub.descriptions import recurrent_config
from pipeline.hub.families import PLAIN, REFUSED, Expected, expect
from pipeline.hub.model_facts import read_model_facts
from pipeline.hub.reward_heads import CLASSIFIER
from pipeline.hub.sources import ModelSource
from pipeline.hub.tokenizer_facts import TokenizerFacts
from pipeline.hub.tokenizers import why_tokens_differ
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json
from pipeline.protocol.specs import Drafts, HostSpec
from pipeline.protocol.topology import BASE, HostPlan, HostRole, Topology
from pipeline.sections import ModelConfig

DRAFT = "draft"  # the model that proposes tokens, its role and its place in messages
PLACE = "decoding.draft_model"
# in a config.json: layers at the end have no keys of their own; embeddings of all layers are one weight
SHARED_BY_LAYERS = ("num_kv_shared_layers", "hidden_size_per_layer_input")


def why_not_drafted(
    config: Config, topology: Topology, sources: Mapping[str, ModelSource], expected: Mapping[str, Expected]
) -> tuple[str, ...]:
    """What keeps passes from verifying proposed tokens; empty where nothing does.

    Args:
        config: of the run.
        topology: its hosts.
        sources: their models, by host name.
        expected: how each is decoded, by host name.

    Raises:
        ConfigurationError: `decoding.draft` names sources, or there is a `decoding.draft_model`, and it would have
            no effect.
    """
    if not (wanted := config.draft_sources):
        return config.undrafted
    reasons = tuple(
        f"{plan.name} ({', '.join(plan.serves)}) {reason}"
        for plan in topology.hosts
        if (reason := _why_not_verified(plan, sources[plan.name], expected.get(plan.name)))
    )
    if reasons and config.decoding.asks_for_drafts:
        named = PLACE if config.decoding.draft == "auto" else f"decoding.draft: [{', '.join(wanted)}]"
        raise ConfigurationError(f"{named} has no effect: {'; '.join(reasons)}; leave it out")
    return reasons


def where_drafted(config: Config, undrafted: Sequence[str]) -> Drafts:
    """Where passes verify proposed tokens. What they save on a GPU is not measured, so there they are asked for.

    Args:
        config: of the run.
        undrafted: what `why_not_drafted` says.
    """
    if undrafted:
        return Drafts.NOWHERE
    return Drafts.ANYWHERE if config.decoding.asks_for_drafts else Drafts.CPU


def draft_section(config: Config) -> ModelConfig | None:
    """The model that proposes tokens; None where none does.

    It is in the coordinator's process, which over Ray sees no GPU.
    """
    chosen = config.decoding.draft_model
    if chosen is None or DraftSource.MODEL not in config.draft_sources:
        return None
    section = chosen.section(config.base)
    if config.cluster.transport is Transport.LOCAL:
        return section
    if section.device.startswith("cuda"):
        raise ConfigurationError(
            f"{PLACE}.device: {section.device} needs cluster.transport: local; over Ray the coordinator sees no GPU"
        )
    return section.model_copy(update={"device": "cpu"})


@contextmanager
def naming_draft_model() -> Iterator[None]:
    """Have errors of its files name the model that proposes tokens as their place."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{PLACE}: {error}") from error


def draft_host(section: ModelConfig) -> HostPlan:
    """The model that proposes tokens, as the memory of a host is planned."""
    return HostPlan(DRAFT, section, (HostRole(DRAFT),), {}, (DRAFT,), reads_text=False, objectives={})


def specify_draft(
    config: Config,
    source: ModelSource,
    base_tokens: TokenizerFacts,
    tokens: TokenizerFacts,
    vocab_size: int,
    ends: Container[int],
    cache_folder: Path,
) -> HostSpec:
    """How to start the model that proposes tokens.

    Args:
        config: of the run.
        source: the model.
        base_tokens: of the base.
        tokens: of the model.
        vocab_size: token ids that answers are made of.
        ends: ids that end an answer.
        cache_folder: where weights are kept that are fetched.

    Raises:
        ConfigurationError: it cannot propose tokens of the base, with the reason.
    """
    section = draft_section(config)
    assert section is not None
    assert config.decoding.draft_model is not None
    layers = config.decoding.draft_model.layers
    if reason := _why_not_proposing(source, base_tokens, tokens, vocab_size, ends, layers):
        raise ConfigurationError(f"{PLACE}: {source.name} {reason}")
    return HostSpec(
        name=DRAFT,
        serves=(DRAFT,),
        source=source,
        dtype=section.dtype,
        device=section.device,
        roles=(HostRole(DRAFT),),
        num_slots=config.cluster.first_slots,
        vocab_size=vocab_size,
        strict=False,  # what it proposes is verified
        cache_folder=cache_folder,
        attention=section.attention,
        layers=layers,
    )


def _why_not_proposing(
    source: ModelSource,
    base_tokens: TokenizerFacts,
    tokens: TokenizerFacts,
    vocab_size: int,
    ends: Container[int],
    layers: int | None,
) -> str | None:
    """Why a model cannot propose tokens, as far as its files show; None: no reason."""
    facts, tree = read_model_facts(source), read_json(LocalTree(Path(source.path)), CONFIG)
    text = tree.get("text_config") or tree
    if any(name.endswith(CLASSIFIER) for name in facts.architectures):
        return f"is a reward model ({facts.architectures[0]}), which proposes no tokens; name a language model"
    if differing := why_tokens_differ(base_tokens, tokens, BASE, "it", ends=ends):
        return f"has other tokens than the base, so it can propose none ({differing}); name a model of its family"
    if facts.vocab_size < vocab_size:
        return f"has an embedding of {facts.vocab_size:,} rows, and answers are made of {vocab_size:,} tokens"
    if recurrent_config(source) is not None:
        return "keeps states, which cannot go back to before a rejected token; name a model that only attends"
    if (expected := expect(tree)).decoding in (PLAIN, REFUSED):
        return f"is not decoded in slots, which proposing takes: {expected.reason}"
    if layers is not None and layers >= (facts.num_layers or 0):
        return f"has {facts.num_layers} layers; draft_model.layers must be below that, got {layers}"
    if layers is not None and (shared := [name for name in SHARED_BY_LAYERS if text.get(name)]):
        return (
            f"has layers that share keys or weights ({shared[0]}), so its first ones are no model; name a whole one"
        )
    return None


def _why_not_verified(plan: HostPlan, source: ModelSource, expected: Expected | None) -> str | None:
    """Why a host reads one token of a row in a pass; None where its device decides."""
    if plan.is_reward_model:
        return "scores candidates after the text of each row, and a pass has one such text"
    if plan.reads_text:
        return "reads text by tokens of its own, one step at a time"
    if expected is not None and expected.decoding == PLAIN:
        return "is decoded one row at a time"
    if recurrent_config(source) is not None:
        return "keeps states that a rejected token would have changed"
    return None
