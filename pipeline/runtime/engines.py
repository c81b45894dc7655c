"""The one place where engines are made: for this process, for Ray, for benchmarks and for tests."""

from __future__ import annotations

import warnings
from itertools import chain

from pipeline.config.sections import Config
from pipeline.config.units import Unit
from pipeline.config.variants import sampling_of
from pipeline.engine.choices import ChoiceEngine
from pipeline.engine.decoding import DecodingEngine
from pipeline.engine.drafting import Drafter
from pipeline.engine.engine import Engine
from pipeline.engine.shards import ShardDecoder
from pipeline.monitoring.waits import waiting_for
from pipeline.protocol.drafts import OF_MODEL, DraftingModel
from pipeline.protocol.hosts import Hosts, ScoringClient
from pipeline.protocol.memory import LONG_PROMPT, slots_that_fit
from pipeline.protocol.specs import Drafts, HostSpec
from pipeline.quoting import one_line
from pipeline.runtime.assembly import Assembly

MIN_SLOTS_FOR_GROUPS = 8  # with fewer slots, half a batch takes a host nearly as long as a whole one


def make_engine(assembly: Assembly, hosts: Hosts, *, draft_model: DraftingModel | None = None) -> Engine:
    """An engine over loaded hosts, all of which are resized to its slots.

    Args:
        assembly: the replica.
        hosts: its clients, in the order of the assembly's hosts.
        draft_model: the assembly's model that proposes tokens, where it is loaded already.

    Raises:
        HostError: a host failed.
    """
    config = assembly.config
    drafter = make_drafter(assembly, hosts, draft_model)  # before slots take the memory that is left
    num_slots = agree_on_slots(config, hosts, drafter)
    return Engine(
        assembly.topology,
        hosts,
        assembly.prompter,
        config.decoding,
        assembly.variants,
        num_slots=num_slots,
        num_groups=2 if hosts.is_concurrent and num_slots >= MIN_SLOTS_FOR_GROUPS else 1,
        max_failures=config.errors.max_host_failures,
        loaded_slots=config.cluster.first_slots,
        drafter=drafter,
    )


def make_decoding_engine(assembly: Assembly, hosts: Hosts) -> DecodingEngine:
    """An engine whose games are over the units of the run's variants: tokens, blocks or answers. Raises HostError."""
    engine, variants = make_engine(assembly, hosts), assembly.variants
    if all(variant.unit is Unit.TOKEN for variant in variants):
        return engine
    scorers = {} if assembly.scorers is None else assembly.scorers.load()
    return ChoiceEngine(engine, assembly.topology, assembly.prompter, assembly.config.decoding, variants, scorers)


def make_decoder(assembly: Assembly, hosts: Hosts) -> ShardDecoder:
    """An engine for whole shards: every variant and sample of every row."""
    return ShardDecoder(
        make_decoding_engine(assembly, hosts),
        num_variants=len(assembly.variants),
        num_samples=assembly.config.decoding.n,
    )


def agree_on_slots(config: Config, hosts: Hosts, drafter: Drafter | None) -> int:
    """The slots of a replica: the configured number, or as many as fit into every memory; hosts are resized to it."""
    if config.cluster.slots != "auto":
        return config.cluster.slots
    row_tokens = LONG_PROMPT + config.decoding.max_new_tokens
    budgets = [client.memory_budgets(row_tokens).result() for client in hosts.all]
    own = () if drafter is None else drafter.memory_budgets(row_tokens)
    num_slots = slots_that_fit(chain(own, *budgets))
    for client in hosts.all:
        client.resize(num_slots).result()
    if drafter is not None:
        drafter.resize(num_slots)
    return num_slots


def make_drafter(assembly: Assembly, hosts: Hosts, model: DraftingModel | None = None) -> Drafter | None:
    """What proposes tokens to an engine; None where nothing is proposed, or some host verifies nothing.

    `model` is the one that is to propose them, where it is loaded already.

    Raises:
        ConfigurationError: the model that is to propose tokens cannot be loaded.
    """
    sources, prompter = assembly.config.draft_sources, assembly.prompter
    if not sources:
        return None
    rows_of_slots = [_rows_of_slot(client) for client in hosts.all]
    if undrafted := [
        plan.name
        for plan, rows_of_slot in zip(assembly.topology.hosts, rows_of_slots, strict=True)
        if rows_of_slot is None
    ]:
        # otherwise the plan has said why
        if assembly.config.decoding.asks_for_drafts and all(
            spec.drafts is not Drafts.NOWHERE for spec in assembly.hosts
        ):
            names = ", ".join(undrafted)
            warnings.warn(
                f"decoding.draft has no effect: on their devices these hosts verify no proposed tokens: {names}",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    if model is None and assembly.draft is not None:
        model = _load_draft_model(assembly.draft, assembly)
    sampling = sampling_of(assembly.config.decoding, assembly.variants)
    return Drafter(
        sources,
        lambda running: prompter.encode_existing(running.row, running.prompts)[0],
        model=model,
        draw=(sampling.temperature, sampling.top_p),
        rows_of_slots=[rows or 0 for rows in rows_of_slots],
        runs_ahead=hosts.runs_ahead,
    )


def _load_draft_model(spec: HostSpec, assembly: Assembly) -> DraftingModel | None:
    """The loaded model; None where there is no memory for it, as no answer depends on it."""
    # take seconds, and most runs have no such model
    from pipeline.worker.hosts import is_out_of_memory
    from pipeline.worker.start import start_drafting

    with waiting_for(f"loading {OF_MODEL} ({spec.source.name})"):
        try:
            return start_drafting(spec, sampling_of(assembly.config.decoding, assembly.variants))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error)
            warnings.warn(f"{OF_MODEL}: {reason}; the run goes on without it", RuntimeWarning, stacklevel=2)
            return None


def _rows_of_slot(client: ScoringClient) -> int | None:
    """The rows that a slot takes of a host's passes of fixed shapes, 0 of others; None: some process of the host
    verifies no drafts."""
    budgets = client.memory_budgets(1).result()
    return max(each.rows_of_slot for each in budgets) if all(each.verifies_drafts for each in budgets) else None
