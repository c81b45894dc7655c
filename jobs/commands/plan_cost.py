"""`cage plan`: how long a run takes and what it costs, from what a run of the kind was measured at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.sections import Config, Transport
from pipeline.errors import ConfigurationError
from pipeline.hub.gpus import Gpu
from pipeline.monitoring.progress import duration
from pipeline.runtime.memory_plan import PlannedHost, lay_out_devices
from pipeline.storage.pace import measure_pace
from pipeline.storage.run import Run


@dataclass(frozen=True, slots=True)
class Throughput:
    """How fast a run is expected to be.

    Args:
        tokens_per_second: of one replica.
        tokens_per_answer: None where it was not measured.
        source: in words.
    """

    tokens_per_second: float
    tokens_per_answer: float | None
    source: str


def find_throughput(config: Config, like: str | None, stated: float | None) -> Throughput | None:
    """What was stated, or measured: by another run, or by this run so far; None where nothing is known.

    Args:
        config: of the run.
        like: folder of a run whose commit records are read; None: the run's own.
        stated: tokens a second of one replica.

    Raises:
        ConfigurationError: the other run has too few commit records.
    """
    measured = None if like is None else _measure(like, num_replicas=None)
    if like is not None and measured is None:
        raise ConfigurationError(f"{like} has no two commits some time apart, so it shows no speed")
    if measured is None:
        measured = _measure(config.output.path, num_replicas=config.cluster.replica_range.max)
    if stated is not None:
        return Throughput(stated, None if measured is None else measured.tokens_per_answer, "as stated")
    return measured


def _measure(path: str, *, num_replicas: int | None) -> Throughput | None:
    """The pace of a run that is there, of one of its replicas; None where it has none yet."""
    try:
        run = Run.open(path)
    except ConfigurationError:
        if num_replicas is None:
            raise
        return None  # this run has not begun
    pace = measure_pace(run.committed().values())
    if pace is None:
        return None
    stored = run.plan.config.get("cluster", {})
    found = stored.get("replicas", 1) if isinstance(stored, dict) else 1
    replicas = num_replicas or (found["max"] if isinstance(found, dict) else found)
    return Throughput(
        pace.tokens_per_second / replicas,
        pace.tokens_per_answer,
        f"measured by {pace.num_shards:,} shards of {path}, {replicas:,} replica{'s' * (replicas != 1)}",
    )


def count_gpus(hosts: Sequence[PlannedHost], config: Config) -> float:
    """GPUs of all replicas: those that Ray reserves, a share as a share; without Ray those that hosts are on."""
    if config.cluster.transport is Transport.LOCAL:
        return sum(device.device_type == "cuda" for device in lay_out_devices(hosts, config))
    of_replica = 0.0
    for host in hosts:
        if host.device_type == "cuda":
            model, share = host.plan.model, host.plan.model.resources.num_gpus
            of_replica += model.tensor_parallel * (model.pipeline_parallel if share is None else share)
    return of_replica * config.cluster.replica_range.max


def describe_cost(
    hosts: Sequence[PlannedHost],
    config: Config,
    num_answers: int,
    num_rows: int,
    *,
    gpu: Gpu | None,
    throughput: Throughput | None,
    price: float | None,
) -> list[str]:
    """Lines about time, GPU-hours and, with a price, cost; what is missing for them is said.

    Args:
        hosts: of one replica.
        config: of the run.
        num_answers: of the whole run.
        num_rows: of the input.
        gpu: the kind of GPU.
        throughput: of one replica.
        price: of one GPU for an hour.
    """
    num_gpus = count_gpus(hosts, config)
    lines = [] if gpu is None else [_bound(hosts, gpu, config.cluster.slots)]
    if throughput is None:
        lines.append(
            "time      not known before two shards are done; --like RUN reckons with another run, --throughput with "
            "tokens/s of one replica"
        )
        return lines
    limit, measured = config.decoding.max_new_tokens, throughput.tokens_per_answer
    of_answer = float(limit) if measured is None else min(measured, limit)
    seconds = num_answers * of_answer / (throughput.tokens_per_second * config.cluster.replica_range.max)
    how = f"at most {limit:,} tokens" if measured is None else f"{of_answer:,.0f} tokens"
    lines.append(
        f"time      {duration(seconds)}: {num_answers:,} answers of {how}, "
        f"{throughput.tokens_per_second:,.1f} tokens/s a replica ({throughput.source})"
    )
    if num_gpus:
        hours = num_gpus * seconds / 3600
        text = f"cost      {hours:,.2f} GPU-hours on {num_gpus:g} GPU{'s' * (num_gpus != 1)}"
        if price is not None and num_rows:
            cost = hours * price
            text += f"; at {price:g} a GPU-hour {cost:,.2f}, {cost * 1000 / num_rows:,.2f} for 1,000 rows"
        lines.append(text)
    elif price is not None:
        raise ConfigurationError("--price is for an hour of a GPU, and no host of this plan is on one; add --gpu")
    return lines


def _bound(hosts: Sequence[PlannedHost], gpu: Gpu, slots: int | str) -> str:
    """What the slowest host of a replica would do were it busy with nothing but reading its weights once a step."""
    seconds = max((host.weight_bytes / gpu.bytes_per_s for host in hosts if host.device_type == "cuda"), default=0.0)
    if not seconds:
        return f"bound     none: no host is on a {gpu.name}"
    num_slots = slots if isinstance(slots, int) else 1
    what = "a replica" if isinstance(slots, int) else "a slot"
    return (
        f"bound     {num_slots / seconds:,.0f} tokens/s {what} at most, by the speed of {gpu.name}'s memory alone "
        f"({gpu.source})"
    )
