"""What every device of a run holds, and how many slots fit: reckoned before anything is loaded.

`slots: auto` asks loaded hosts by the same arithmetic (`pipeline.protocol.memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.sections import Config, Transport
from pipeline.hub.descriptions import BYTES_BY_DTYPE, CONVERTED, STORED_BYTES, recurrent_config
from pipeline.hub.gpus import Gpu
from pipeline.hub.model_facts import ModelFacts, read_model_facts
from pipeline.hub.parameters import ParameterCounts, count_parameters, count_stated
from pipeline.hub.quantisation import KINDS, METHODS
from pipeline.hub.sources import AdapterSource, ModelSource
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json
from pipeline.protocol.memory import (
    LONG_PROMPT,
    MOST_SLOTS,
    HostMemory,
    PassSizes,
    memory_of_host,
    room_for_slots,
    rows_beside_slots,
)
from pipeline.protocol.messages import MemoryBudget
from pipeline.protocol.spread import spread
from pipeline.protocol.topology import HostPlan
from pipeline.sections import ModelConfig, ModelSizes

ADAPTERS = "adapters"  # as their bytes are labelled
APPLES = "metal"  # which other GPUs expand, too


@dataclass(frozen=True, slots=True)
class SizedModel:
    """A model as its memory is reckoned.

    Args:
        facts: of its configuration.
        counts: parameters by stored dtype, of safetensors' names.
        quantisation: transformers' name of how its files are quantised; None of ordinary files.
        linears: what its configuration makes, where that is not what its files hold: of models that are quantised at
            load, and of those that become ordinary.
        is_tied: whether the head's weights are known to be the embedding's.
    """

    facts: ModelFacts
    counts: Mapping[str, int]
    quantisation: str | None = None
    linears: ParameterCounts | None = None
    is_tied: bool = False

    def cache_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token of one row, over all layers."""
        facts = self.facts
        numbers = 2 * (facts.num_layers or 0) * (facts.num_kv_heads or 0) * (facts.head_dim or 0)
        return numbers * BYTES_BY_DTYPE[dtype]


@dataclass(frozen=True, slots=True)
class PlannedHost:
    """A host and what it takes.

    Args:
        plan: roles and model.
        device_type: "cpu" or "cuda".
        dtype: that it computes in.
        weights: bytes by what they are stored as: a dtype, or a way of quantisation; of each rank, where several
            hold a part of the model each.
        memory: beside them, of each rank.
        states: bytes of one row's states; None where they are not known before the model is loaded.
        stages: what each of its devices holds, where its layers are spread over several; else none.
    """

    plan: HostPlan
    device_type: str
    dtype: str
    weights: Mapping[str, int]
    memory: HostMemory
    states: int | None = 0
    stages: tuple[PlannedHost, ...] = ()

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def on_devices(self) -> tuple[PlannedHost, ...]:
        """What is on each of its devices."""
        return self.stages or (self,) * self.plan.model.tensor_parallel


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """A device, or the memory of a machine, and the hosts in it.

    Args:
        name: for people.
        device_type: "cpu" or "cuda".
        capacity: bytes; None where it is not known.
        hosts: of all replicas that share it.
    """

    name: str
    device_type: str
    capacity: int | None
    hosts: tuple[PlannedHost, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(host.weight_bytes for host in self.hosts)

    @property
    def slot_bytes(self) -> int:
        return sum(host.memory.slot_bytes for host in self.hosts)

    @property
    def reserved_bytes(self) -> int:
        return sum(host.memory.reserved_bytes for host in self.hosts)

    @property
    def num_fitting(self) -> int | None:
        """Slots that fit, up to the number beyond which more gain little; below 1 where none does."""
        if self.capacity is None:
            return None
        free = self.capacity - self.weight_bytes
        budgets = [
            MemoryBudget(
                self.name,
                self.device_type,
                host.memory.slot_bytes,
                free,
                reserved_bytes=host.memory.reserved_bytes,
            )
            for host in self.hosts
        ]
        return min(MOST_SLOTS[self.device_type], room_for_slots(budgets))


def size_of_source(source: ModelSource) -> SizedModel:
    """The sizes of a resolved model. Raises ConfigurationError where they cannot be found."""
    stored = None if source.kind is not None else source.quantisation
    may_expand = stored is not None and METHODS[stored].is_expanded_on_cpu
    linears = count_parameters(source) if source.kind is not None or may_expand else None
    tree = read_json(LocalTree(Path(source.path)), CONFIG)
    is_tied = tree.get("tie_word_embeddings") is True
    return SizedModel(read_model_facts(source), source.num_parameters_by_dtype, stored, linears, is_tied)


def size_as_stated(sizes: ModelSizes) -> SizedModel:
    """A model of stated sizes, whose files are in 16 bits."""
    counts = count_stated(sizes)
    facts = ModelFacts(
        model_type="stated",
        architectures=(),
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads or sizes.heads,
        head_dim=sizes.hidden_size // sizes.heads,
        vocab_size=sizes.vocab_size,
        context_length=None,
        eos_token_ids=frozenset(),
        label_names={},
        hidden_size=sizes.hidden_size,
        mlp_size=sizes.intermediate_size,
    )
    return SizedModel(facts, {"BF16": counts.total}, None, counts, sizes.is_tied)


def first_layers(model: SizedModel, count: int) -> SizedModel:
    """The model without its later layers. Whatever is neither embedding nor head is taken to be in layers, in all
    alike. A head has weights of its own unless it is known to share the embedding's."""
    facts = model.facts
    whole = sum(model.counts.values())
    num_outside = 1 if model.is_tied else 2
    outside = min(whole, num_outside * facts.vocab_size * (facts.hidden_size or 0))
    share = (outside + (whole - outside) * count / (facts.num_layers or count)) / max(whole, 1)
    counts = {stored: round(number * share) for stored, number in model.counts.items()}
    return replace(model, facts=replace(facts, num_layers=count), counts=counts)


def weights_of(model: SizedModel, config: ModelConfig, dtype: str, device_type: str) -> dict[str, int]:
    """Bytes of a model's weights once loaded, by what they are stored as."""
    element, counts = BYTES_BY_DTYPE[dtype], model.counts
    if config.quantization is not None and model.linears is not None:
        kind, linears = config.quantization.kind, model.linears
        return {
            kind: int(linears.in_linears * KINDS[kind].bits / 8),
            dtype: (linears.total - linears.in_linears) * element,
        }
    ordinary = sum(count for stored, count in counts.items() if stored in CONVERTED)
    others = {stored: count for stored, count in counts.items() if stored not in CONVERTED}
    may_expand = model.quantisation is not None and METHODS[model.quantisation].is_expanded_on_cpu
    if may_expand and model.linears is not None and (device_type == "cpu" or model.quantisation == APPLES):
        return {dtype: model.linears.total * element}
    found = {dtype: ordinary * element}
    if others:
        label = model.quantisation or "as stored"
        found = {label: int(sum(count * STORED_BYTES.get(stored, 4.0) for stored, count in others.items()))} | found
    return found


def plan_host(
    plan: HostPlan,
    model: SizedModel,
    config: Config,
    *,
    device_type: str,
    adapters: Sequence[AdapterSource] = (),
    source: ModelSource | None = None,
    drafts: bool = False,
) -> PlannedHost:
    """What a host will take.

    Args:
        plan: of the topology.
        model: its sizes.
        config: of the run.
        device_type: "cpu" or "cuda".
        adapters: that it holds.
        source: of a model that is there, whose states are asked for.
        drafts: whether it verifies proposed tokens, where it is decoded in slots.
    """
    dtype = plan.model.dtype
    if dtype == "auto":
        dtype = "float32" if device_type == "cpu" else "bfloat16"
    facts, element = model.facts, BYTES_BY_DTYPE[dtype]
    weights = weights_of(model, plan.model, dtype, device_type)
    if adapters:
        weights[ADAPTERS] = element * sum(sum(each.num_parameters_by_dtype.values()) for each in adapters)
    hidden, num_ranks = facts.hidden_size or 0, plan.model.tensor_parallel
    if num_ranks > 1:  # plans split the layers; embeddings may stay whole on every rank
        whole = min(sum(weights.values()), 2 * facts.vocab_size * hidden * element)
        split = 1 - whole / max(1, sum(weights.values()))
        weights = {label: round(held * (1 - split + split / num_ranks)) for label, held in weights.items()}
    is_quantised = plan.model.quantization is not None and model.linears is not None
    passes = PassSizes(
        hidden,
        facts.mlp_size or 4 * hidden,
        facts.attention_size,
        0 if plan.is_reward_model else facts.vocab_size,
        element,
        facts.head_dim or 0,
        model.linears.largest if is_quantised and model.linears is not None else 0,
    )
    share, states, num_kept = _recurrent(source, dtype, facts)
    scored_tokens = _scored_tokens(plan, config)
    num_more_rows = 0
    if not scored_tokens and states == 0 and plan.model.attention != "plain":
        has_fixed_shapes = device_type == "cuda"
        num_more_rows = rows_beside_slots(len(plan.roles), has_fixed_shapes=has_fixed_shapes, drafts=drafts)

    def part(held: Mapping[str, int], of_layers: float) -> PlannedHost:
        """What is on a device with some of the weights and a share of the layers."""
        memory = memory_of_host(
            passes,
            num_roles=len(plan.roles),
            row_tokens=row_tokens(config, facts.context_length),
            cache_bytes_per_token=round(model.cache_bytes_per_token(dtype) * share * of_layers),
            state_bytes_per_row=round((states or 0) * of_layers),
            num_kept=num_kept * len(plan.roles),
            scored_tokens=scored_tokens,
            num_more_rows=num_more_rows,
            device_type=device_type,
            num_ranks=num_ranks,
        )
        return PlannedHost(plan, device_type, dtype, held, memory, states)

    whole_host = part(weights, 1.0)
    embedding_bytes = 2 * facts.vocab_size * hidden * element
    return replace(whole_host, stages=tuple(part(*each) for each in _stages(whole_host, facts, embedding_bytes)))


def _stages(host: PlannedHost, facts: ModelFacts, embedding_bytes: int) -> Iterator[tuple[Mapping[str, int], float]]:
    """The weights and the share of the layers of each device that layers are spread over, as if all were alike."""
    num_devices, num_layers = host.plan.model.pipeline_parallel, facts.num_layers or 0
    if num_devices == 1 or num_layers < num_devices:
        return
    total = max(1, host.weight_bytes)
    beside = min(total, embedding_bytes)
    of_layer = (total - beside) // num_layers
    counts = spread([of_layer] * num_layers, num_devices, first_bytes=beside)
    for at, count in enumerate(counts):
        held = (count * of_layer + (beside if at == 0 else 0)) / total
        yield {label: round(num_bytes * held) for label, num_bytes in host.weights.items()}, count / num_layers


def row_tokens(config: Config, context_length: int | None = None) -> int:
    """Tokens of the longest row that is certain to fit: its answer, and a prompt of up to 1,024 tokens."""
    longest = config.decoding.max_new_tokens + LONG_PROMPT
    return min(longest, context_length or longest)


def _recurrent(source: ModelSource | None, dtype: str, facts: ModelFacts) -> tuple[float, int | None, int]:
    """The share of layers that keep keys, the bytes of a row's states (None where only loading shows them), and the
    rows of each role that are kept beside slots."""
    recurrent = None if source is None else recurrent_config(source)
    if recurrent is None:
        return 1.0, 0, 0
    # these import torch and transformers, which takes seconds
    from pipeline.attention.cached_layers import bytes_per_row, cache_of_config
    from pipeline.worker.recurrent_runner import NUM_KEPT

    try:
        layers = cache_of_config(recurrent, dtype)
    except Exception:  # whatever the model raises; what it keeps is seen when it is loaded
        return 1.0, None, NUM_KEPT
    share = sum(layer.attends for layer in layers) / max(1, facts.num_layers or 0)
    return share, bytes_per_row(layers).total(), NUM_KEPT


def _scored_tokens(plan: HostPlan, config: Config) -> int:
    """Tokens that a row reads to score its candidates; 0 of a host that gives log-probabilities."""
    scored = [role.scoring.candidates for role in plan.roles if role.scoring]
    if scored:
        return 1 + max(scored)
    candidates = config.decoding.candidates
    return 1 + candidates if plan.reads_text and candidates != "all" else 0


def device_type_of(model: ModelConfig, gpu: Gpu | None) -> str:
    """Where a host will be: on a GPU where one is asked for, or planned for and not declined."""
    if model.device == "cpu" or model.resources.num_gpus == 0:
        return "cpu"
    wants_gpu = model.device.startswith("cuda") or bool(model.resources.num_gpus) or model.pipeline_parallel > 1
    return "cuda" if wants_gpu or gpu is not None else "cpu"


def lay_out_devices(
    hosts: Sequence[PlannedHost], config: Config, *, gpu: Gpu | None = None, machine_bytes: int | None = None
) -> list[PlannedDevice]:
    """The devices that the hosts of all replicas take, as Ray fills them: a share of a GPU goes to the first GPU with
    room for it.

    Args:
        hosts: of one replica.
        config: of the run.
        gpu: the kind of GPU; None where it is not known.
        machine_bytes: memory of the machine, where all hosts on CPUs are on one; None where it is not known.
    """
    is_local = config.cluster.transport is Transport.LOCAL
    on_gpus: list[tuple[float, list[PlannedHost]]] = []
    by_index: dict[int, list[PlannedHost]] = {}
    on_cpus: list[PlannedHost] = []
    for _ in range(config.cluster.replica_range.max):
        for at, part in [(at, part) for each in hosts for at, part in enumerate(each.on_devices)]:
            if part.device_type == "cpu":
                on_cpus.append(part)
            elif is_local:
                index = int(part.plan.model.device.partition(":")[2] or 0) + at
                by_index.setdefault(index, []).append(part)
            else:
                _place(part, on_gpus)
    placed = [by_index[index] for index in sorted(by_index)] if is_local else [held for _, held in on_gpus]
    title = "GPU" if gpu is None else gpu.name
    memory = None if gpu is None else gpu.memory_bytes
    devices = [PlannedDevice(f"{title} {at}", "cuda", memory, tuple(held)) for at, held in enumerate(placed, 1)]
    if on_cpus:
        devices.append(PlannedDevice("memory of the CPUs", "cpu", machine_bytes, tuple(on_cpus)))
    return devices


def _place(host: PlannedHost, devices: list[tuple[float, list[PlannedHost]]]) -> None:
    """Put a host on GPUs, each with the share that is taken of it. A host with several is on the first of them."""
    model, stated = host.plan.model, host.plan.model.resources.num_gpus
    share = 1.0 if stated is None or model.pipeline_parallel > 1 else stated
    if share < 1:
        for at, (taken, held) in enumerate(devices):
            if taken + share <= 1 + 1e-9:
                devices[at] = (taken + share, [*held, host])
                return
    devices.append((min(share, 1.0), [host]))
