"""Hosts whose layers are spread over simulated devices, with answers that can be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jobs.families.simulated_devices import KIND
from pipeline.config.sections import Config
from pipeline.protocol.hosts import Hosts
from pipeline.runtime.assembly import Assembly, assemble
from pipeline.runtime.local_hosts import start_hosts
from support.decoding import NOWHERE


def on_devices(config: Config, num_devices: int, *, kind: str = KIND, **fields: Any) -> tuple[Assembly, Hosts]:
    """Start the hosts of a run with the layers of each over so many devices.

    Args:
        config: of the run, in one process.
        num_devices: of each host; the first is the same for all.
        kind: of the devices.
        fields: of the specs, beside.
    """
    assembly = assemble(config, NOWHERE)
    placed = {"device": kind, "pipeline_parallel": num_devices, "dtype": "float32", **fields}
    specs = [replace(spec, **placed) for spec in assembly.hosts]
    assembly = replace(assembly, hosts=tuple(specs))
    return assembly, start_hosts(assembly)
