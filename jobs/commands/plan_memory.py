"""`cage plan`: what every host and every device holds, how many slots fit, and what to change where they do not."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.commands.text import table
from pipeline.config.sections import Config
from pipeline.hub.descriptions import BYTES_BY_DTYPE
from pipeline.hub.gpus import Gpu
from pipeline.protocol.memory import SHARE
from pipeline.quoting import size
from pipeline.runtime.drafts import draft_host, draft_section
from pipeline.runtime.memory_plan import (
    ADAPTERS,
    PlannedDevice,
    PlannedHost,
    device_type_of,
    first_layers,
    lay_out_devices,
    plan_host,
    row_tokens,
    size_of_source,
)
from pipeline.runtime.replica_plan import ReplicaPlan

HOSTS = ["host", "device", "CPUs", "GPUs", "dtype", "weights", "KV cache and logits of a slot", "beside slots"]
DEVICES = ["device", "memory", "hosts", "weights", "beside slots", "a slot", "headroom", "slots that fit"]


def plan_hosts(replica: ReplicaPlan, gpu: Gpu | None) -> list[PlannedHost]:
    """What each host of a replica takes. Raises ConfigurationError where a model's sizes cannot be found."""
    hosts = [
        plan_host(
            plan,
            size_of_source(spec.source),
            replica.config,
            device_type=device_type_of(plan.model, gpu),
            adapters=tuple(spec.adapters.values()),
            source=spec.source,
            drafts=spec.drafts.are_on(device_type_of(plan.model, gpu)),
        )
        for plan, spec in zip(replica.topology.hosts, replica.hosts, strict=True)
    ]
    draft, section = replica.draft, draft_section(replica.config)
    if draft is not None and section is not None:
        model = size_of_source(draft.source)
        model = model if draft.layers is None else first_layers(model, draft.layers)
        device_type = device_type_of(section, gpu)
        hosts.append(
            plan_host(draft_host(section), model, replica.config, device_type=device_type, source=draft.source)
        )
    return hosts


def placement(hosts: Sequence[PlannedHost], config: Config) -> str:
    """A table with a row for each host of a replica."""
    rows = [_host_row(host, config) for host in hosts]
    if all(host.states == 0 for host in hosts):
        return table(HOSTS, rows)
    states = [_states(host) for host in hosts]
    return table([*HOSTS, "states of a row"], [[*row, each] for row, each in zip(rows, states, strict=True)])


def _states(host: PlannedHost) -> str:
    if host.states is None:
        return "not known before it is loaded"
    return size(host.states) if host.states else "none"


def _host_row(host: PlannedHost, config: Config) -> list[str]:
    plan, gpus = host.plan, host.plan.model.resources.num_gpus
    num_ranks, num_devices = plan.model.tensor_parallel, plan.model.pipeline_parallel
    each = f"{num_ranks} x " if num_ranks > 1 else ""
    if gpus is None and num_devices > 1:
        gpus = num_devices
    return [
        plan.name,
        plan.model.device,
        f"{each}{plan.model.resources.num_cpus:g}",
        each + ("auto" if gpus is None else f"{gpus:g}"),
        host.dtype + (" (auto)" if plan.model.dtype == "auto" else ""),
        each + weights_text(host),
        f"{each}{size(host.memory.slot_bytes)} ({len(plan.roles)} rows of {row_tokens(config):,} tokens)",
        each + size(host.memory.reserved_bytes),
    ]


def weights_text(host: PlannedHost) -> str:
    """The bytes of a host's weights, by what they are where that is more than one."""
    held = {label: num_bytes for label, num_bytes in host.weights.items() if num_bytes}
    whole = size(host.weight_bytes)
    if len(held) == 1 and next(iter(held)) in BYTES_BY_DTYPE:
        return whole
    return f"{whole} ({', '.join(f'{label} {size(num_bytes)}' for label, num_bytes in held.items())})"


def describe_devices(hosts: Sequence[PlannedHost], config: Config, gpu: Gpu | None, machine_bytes: int | None) -> str:
    """A table with a row for each device, alike ones together, and a line for each number that must change."""
    devices = lay_out_devices(hosts, config, gpu=gpu, machine_bytes=machine_bytes)
    alike: dict[tuple[object, ...], list[PlannedDevice]] = {}
    for device in devices:
        alike.setdefault((device.device_type, device.capacity, tuple(map(id, device.hosts))), []).append(device)
    groups = list(alike.values())
    rows = [_device_row(group) for group in groups]
    lines = [table(DEVICES, rows)]
    fits = [device.num_fitting for device in devices]
    if gpu is None and any(device.device_type == "cuda" for device in devices):
        lines.append("how many slots fit on a GPU is shown with --gpu, such as --gpu a100-80gb")
    known = [number for number in fits if number is not None]
    if known and min(known) >= 1 and config.cluster.slots == "auto" and len(known) == len(fits):
        lines.append(f"slots: auto becomes {min(known):,} on devices that hold nothing else")
    for group in groups:
        lines += what_to_change(group[0], config)
    return "\n".join(lines)


def _device_row(group: Sequence[PlannedDevice]) -> list[str]:
    device = group[0]
    names = device.name if len(group) == 1 else f"{device.name} and {len(group) - 1} more"
    free = None if device.capacity is None else device.capacity - device.weight_bytes
    held = [host.plan.name for host in device.hosts]
    counted = [name if held.count(name) == 1 else f"{held.count(name)} x {name}" for name in dict.fromkeys(held)]
    fits = device.num_fitting
    return [
        names,
        "not known" if device.capacity is None else size(device.capacity),
        ", ".join(counted),
        size(device.weight_bytes),
        size(device.reserved_bytes),
        size(device.slot_bytes),
        "not known" if free is None else size(max(0, free) * (1 - SHARE[device.device_type])),
        "not known" if fits is None else f"{max(fits, 0):,}",
    ]


def what_to_change(device: PlannedDevice, config: Config) -> list[str]:
    """What does not fit on a device and which numbers would make it fit; nothing where all fits."""
    fits, slots = device.num_fitting, config.cluster.slots
    wanted = 1 if slots == "auto" else slots
    if fits is None or device.capacity is None:
        return []
    room = SHARE[device.device_type] * (device.capacity - device.weight_bytes) - device.reserved_bytes
    if device.slot_bytes * wanted <= room:
        return []
    if fits >= 1:
        return [
            f"{device.name}: {wanted:,} slots do not fit; set cluster.slots={fits} (or auto), or lower "
            f"decoding.max_new_tokens ({config.decoding.max_new_tokens:,})"
        ]
    largest = max(device.hosts, key=lambda host: host.weight_bytes)
    name = "base" if largest.plan.name == "base" else f"the model of {largest.plan.name}"
    section = draft_section(config)
    is_draft = section is not None and largest.plan == draft_host(section)
    ways = []
    if device.weight_bytes < SHARE[device.device_type] * device.capacity:
        ways.append(f"lower decoding.max_new_tokens ({config.decoding.max_new_tokens:,})")
    if is_draft:
        ways.append("choose a smaller decoding.draft_model")
    elif largest.plan.model.tensor_parallel > 1:  # quantised weights are not split
        ways.append(f"split {name} over more ranks (tensor_parallel)")
    elif largest.plan.model.pipeline_parallel > 1:  # nor are they spread
        ways.append(f"spread {name} over more GPUs (pipeline_parallel)")
    elif all(label in BYTES_BY_DTYPE or label == ADAPTERS for label in largest.weights):
        four_bits = device.weight_bytes - largest.weight_bytes * 3 // 4
        ways.append(f"quantise {name} (quantization: bnb-4bit; then about {size(four_bits)} of weights)")
    if len(device.hosts) > 1 and not is_draft:
        ways.append("give its hosts devices of their own (resources.num_gpus: 1)")
    ways.append("take a device with more memory (--gpu)" if device.device_type == "cuda" else "more memory")
    return [
        f"{device.name}: not one slot fits: {size(device.weight_bytes)} of weights, {size(device.reserved_bytes)} "
        f"beside slots and {size(device.slot_bytes)} a slot, with {size(device.capacity)}: {', or '.join(ways)}"
    ]
