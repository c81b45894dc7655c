"""Which names of production modules stand for something simulated while a schedule runs.

Production code has no hooks. What it takes from outside (time, threads, random numbers, the file system, Ray) it
takes from modules that it imports, and here those names are bound to the simulation's. `tests/test_simulation.py`
holds that every module which a run uses and which imports one of these is in this table, or needs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
from collections.abc import Iterator
from typing import Any

from support.unreliable import FreePace

from pipeline.cluster.assignments import Assignments
from simulation import cluster, hosts, memo, paths, pool
from simulation.threads import (
    Current,
    FoldersByProcess,
    Future,
    Queue,
    Random,
    Secrets,
    Signal,
    Threading,
    Time,
    WaitsByThread,
)

OUTSIDE = {"time", "threading", "queue", "signal", "secrets", "random", "os", "ray", "Future", "subprocess", "socket"}

SIMULATED: dict[str, dict[str, Any]] = {
    "pipeline.cluster.board": {
        "time": Time,
        "ray": cluster.Ray,
        "NodeAffinitySchedulingStrategy": cluster.nowhere,
        "MetricExporter": cluster.Exporter,
        "Assignments": functools.partial(Assignments, clock=Time.monotonic),
    },
    "pipeline.cluster.departure": {
        "threading": Threading,
        "os": cluster.Os,
        "draining_nodes": set,
    },
    "pipeline.cluster.host_groups": {
        "time": Time,
        "ray": cluster.Ray,
        "PlacementGroupSchedulingStrategy": cluster.nowhere,
        "draining_nodes": set,
    },
    "pipeline.cluster.host_reports": {
        "threading": Threading,
        "time": Time,
        "os": cluster.Os,
        "secrets": Secrets,
    },
    "pipeline.cluster.placement": {
        "ray": cluster.Ray,
        "placement_group": cluster.PlacementGroup,
        "placement_group_table": lambda group: {},
        "remove_placement_group": cluster.ignore,
    },
    "pipeline.cluster.coordinator": {"threading": Threading, "queue": Queue, "Future": Future},
    "pipeline.cluster.host_actors": {
        "time": Time,
        "ray": cluster.Ray,
        "send_tensors_as_arrays": cluster.ignore,
    },
    "pipeline.cluster.replica": {"threading": Threading, "time": Time, "ray": cluster.Ray, "os": cluster.Os},
    "pipeline.cluster.stream": {
        "ray": pool.RayWithData,
        "ActorPoolStrategy": pool.ActorPoolStrategy,
        "DataContext": cluster.DataContext,
        "logging": cluster.Logging,
        "cluster": cluster.joined_cluster,
        "lost_process": lambda: None,
    },
    "pipeline.engine.drafting": {"time": Time, "Pace": FreePace},
    "pipeline.engine.model_drafts": {"time": Time},
    "pipeline.engine.model_drafts.ModelDrafts": {"_how_many": hosts.ask_about_all},
    "pipeline.engine.calls": {"time": Time, "solve_and_sample": hosts.solve_once},
    "pipeline.engine.scheduler": {"secrets": Secrets},
    "pipeline.engine.shards": {"time": Time},
    "pipeline.monitoring.progress": {"threading": Threading, "time": Time},
    "pipeline.monitoring.reasons": {"kind_of": memo.kind_of},
    "pipeline.monitoring.stall": {"threading": Threading, "time": Time, "signal": Signal},
    "pipeline.monitoring.waits": {"threading": Threading, "time": Time, "_wait_by_thread": WaitsByThread()},
    "pipeline.runtime.assembly": {"load_assembly": memo.load_assembly},
    "pipeline.runtime.local_hosts": {
        "start_proposing": hosts.start_proposing,
        "start_sampling": hosts.start_sampling,
        "start_scoring": hosts.start_scoring,
    },
    "pipeline.stages.relabel": {
        "random": Random,
        "collection_paused": lambda is_for_good: contextlib.nullcontext(),
        "prepare": memo.prepare,
        "plan_replica": memo.plan_replica,
    },
    "pipeline.storage.shard_files": {
        "time": Time,
        "read_table": memo.read_table,
        "to_table": memo.to_table,
        "write_table_bytes": memo.write_table_bytes,
        "output_schema": memo.output_schema,
        "failed_schema": memo.failed_schema,
        "count_tokens": memo.count_tokens,
        "_unsteered": memo.unsteered,
    },
    "pipeline.storage.commits.CommitRecord": {"from_json": staticmethod(memo.record_from_json)},
    "pipeline.storage.plan.Plan": {
        "digest": property(memo.digest),
        "from_json": staticmethod(memo.plan_from_json),
        "read_shard": memo.read_shard,
        "to_json": memo.plan_to_json,
    },
    "pipeline.storage.run": {"render_card": memo.render_card, "render_loading": memo.render_loading},
    "pipeline.stores.local_store": {
        "os": paths.Os,
        "Path": paths.Path,
        "secrets": Secrets,
        "time": Time,
        "_durable_folders": FoldersByProcess(),
        "check_name": memo.check_name,
    },
    "pipeline.stores.object_store": {"file_system": lambda scheme: Current.bucket, "check_name": memo.check_name},
    "pipeline.stores.retries": {"time": Time, "wait_chain": memo.wait_chain, "wait_random": memo.wait_random},
    "pipeline.worker.sampling_host": {"solve_and_sample": hosts.solve_once},
    "pipeline.worker.start": {
        "start_drafting": hosts.start_drafting,
        "start_proposing": hosts.start_proposing,
        "start_sampling": hosts.start_sampling,
        "start_scoring": hosts.start_scoring,
    },
    # retries wait by the clock of their library
    "tenacity": {"time": Time},
    "tenacity.nap": {"time": Time},
    "tenacity.wait": {"random": Random},
}

NEEDS_NOTHING = {
    "pipeline.cluster.assignments": "is given a clock, the simulated one",
    "pipeline.monitoring.events": "writes lines of a log under a lock, without waiting",
    "pipeline.monitoring.host_meter": "measures seconds for metrics, from which nothing follows",
    "pipeline.cluster.processes": "is for benchmarks",
    "pipeline.cluster.scoring": "runs judges, which are not simulated",
    "pipeline.cluster.session": "joins a cluster, for which `cluster.joined_cluster` stands",
    "pipeline.cluster.training": "trains, which is not simulated",
    "pipeline.runtime.rank_groups": "starts ranks of hosts that are split, which are not simulated",
    "pipeline.stages.doctor": "is another command",
    "pipeline.storage.revisions": "is of rows that are run again, which are not simulated",
}


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Bind the names for the block. Garbage is collected between schedules (`collect`), never within one."""
    was_enabled = gc.isenabled()
    before: list[tuple[Any, str, Any]] = []
    try:
        for place, names in SIMULATED.items():
            where = _find(place)
            for name, stand_in in names.items():
                before.append((where, name, vars(where)[name]))
                setattr(where, name, stand_in)
        gc.disable()
        collect()
        yield
    finally:
        if was_enabled:
            gc.enable()
        for where, name, value in reversed(before):
            setattr(where, name, value)


def collect() -> None:
    """Collect garbage; what is left then, modules and results that are kept, is not visited again."""
    gc.collect()
    gc.freeze()


def _find(place: str) -> Any:
    """A module, or a class in one, by its dotted name."""
    parent, _, last = place.rpartition(".")
    if last[:1].isupper():
        return getattr(importlib.import_module(parent), last)
    return importlib.import_module(place)
