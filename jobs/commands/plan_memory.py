"""`cage plan`: where hosts run, and what their weights, KV caches and states take."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.commands.text import table
from pipeline.config.sections import Config
from pipeline.hub.descriptions import ModelDescription, describe_model, recurrent_config
from pipeline.protocol.specs import HostSpec
from pipeline.protocol.topology import HostPlan
from pipeline.quoting import size
from pipeline.runtime.replica_plan import ReplicaPlan
from pipeline.sections import ModelConfig

COLUMNS = ["host", "device", "CPUs", "GPUs", "dtype", "weights", "KV cache per token", "KV cache at the limit"]


@dataclass(frozen=True, slots=True)
class _Cache:
    """What the cache rows of a host take.

    Args:
        num_rows: of all slots and roles, and those that hold what is kept.
        bytes_per_token: keys and values of all rows.
        states: of all rows, for a table; None where the model keeps none.
    """

    num_rows: int
    bytes_per_token: int
    states: str | None = None


def placement(replica: ReplicaPlan) -> str:
    """A table with a row for each host."""
    hosts = list(zip(replica.topology.hosts, replica.hosts, strict=True))
    caches = [_cache(plan, spec, replica.config) for plan, spec in hosts]
    rows = [_row(plan, spec, cache, replica.config) for (plan, spec), cache in zip(hosts, caches, strict=True)]
    if not any(cache.states for cache in caches):
        return table(COLUMNS, rows)
    return table(
        [*COLUMNS, "states"], [[*row, each.states or "none"] for row, each in zip(rows, caches, strict=True)]
    )


def _row(plan: HostPlan, spec: HostSpec, cache: _Cache, config: Config) -> list[str]:
    description = describe_model(spec.source)
    dtype = _dtype(plan.model)
    gpus = plan.model.resources.num_gpus
    longest = _limit_tokens(description, config)
    num_ranks = plan.model.tensor_parallel
    each = f"{num_ranks} x " if num_ranks > 1 else ""
    return [
        plan.name,
        plan.model.device,
        f"{each}{plan.model.resources.num_cpus:g}",
        each + ("auto" if gpus is None else f"{gpus:g}"),
        dtype + (" (auto)" if plan.model.dtype == "auto" else ""),
        size(description.weight_bytes(dtype)),
        f"{size(cache.bytes_per_token)} ({cache.num_rows} rows)",
        f"{size(cache.bytes_per_token * longest)} ({longest:,} tokens)",
    ]


def _cache(plan: HostPlan, spec: HostSpec, config: Config) -> _Cache:
    description = describe_model(spec.source)
    dtype = _dtype(plan.model)
    num_rows = len(plan.roles) * config.cluster.first_slots
    per_token = description.kv_bytes_per_token(dtype)
    recurrent = recurrent_config(spec.source)
    if recurrent is None:
        return _Cache(num_rows, per_token * num_rows)
    # these import torch and transformers, which takes seconds
    from pipeline.attention.cached_layers import bytes_per_row, cache_of_config
    from pipeline.worker.recurrent_runner import NUM_KEPT

    try:
        layers = cache_of_config(recurrent, dtype)
    except Exception:  # whatever the model raises; what it keeps is seen when it is loaded
        return _Cache(num_rows, per_token * num_rows, "not known before it is loaded")
    num_rows += len(plan.roles) * NUM_KEPT
    share = sum(layer.attends for layer in layers) / max(1, description.num_layers)
    return _Cache(num_rows, round(per_token * share) * num_rows, size(bytes_per_row(layers) * num_rows))


def _dtype(model: ModelConfig) -> str:
    """The dtype that "auto" becomes; on a machine that plans for others, bfloat16 where a GPU is asked for."""
    if model.dtype != "auto":
        return model.dtype
    wants_gpu = model.device.startswith("cuda") or bool(model.resources.num_gpus)
    return "bfloat16" if wants_gpu else "float32"


def _limit_tokens(description: ModelDescription, config: Config) -> int:
    """Tokens of the longest row that is certain to fit: its answer, and a prompt of up to 1,024 tokens."""
    longest = config.decoding.max_new_tokens + 1024
    return min(longest, description.context_length or longest)
