"""Measure the decoder beside the forward passes that it cannot do without, and beside a loop as users write it.

A benchmark, no test: it says what was measured on this machine. All cases decode the same rows, one after another in
one process (and one more for Ray's host), with the same number of threads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from jobs.bench.models import (
    SHAPES,
    Work,
    make_assembly,
    make_config,
    make_work,
    save_random_adapters,
    save_random_model,
)
from jobs.bench.plain import bytes_a_pass, copy_bandwidth, decode_plainly, load_plain_model, time_floor
from jobs.bench.ranks import CountingRanks
from pipeline.engine.engine import Engine
from pipeline.errors import ConfigurationError
from pipeline.hub.descriptions import describe_model
from pipeline.hub.embedded import default_cache_folder
from pipeline.hub.parallel_plans import why_not_tensor_parallel
from pipeline.hub.sources import fetch_weights, resolve_model
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json
from pipeline.protocol.hosts import Hosts
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts
from pipeline.runtime.rank_groups import RankGroupHost
from pipeline.runtime.wiring import Wiring

FULL_BATCH_STEPS, FULL_BATCH_ROUNDS = 16, 3
ROW_BY_ROW_STEPS = 4  # each has as many passes as rows
HEAD = ("slots", "principals", "adapters", "rows", "threads", "candidates")


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cases share."""

    model: str
    num_principals: int
    adapters: Sequence[str]
    slots: int
    threads: int
    candidates: int | str
    vocab_size: int
    work: Work
    cache_folder: Path
    num_ranks: int = 1

    def assembly(
        self, *, strict: bool = True, slots: int | None = None, attention: str = "auto", num_ranks: int = 1
    ) -> Assembly:
        config = make_config(
            self.model,
            num_principals=self.num_principals,
            adapters=self.adapters,
            slots=slots or self.slots,
            max_length=max(self.work.lengths),
            strict=strict,
            candidates=self.candidates,
            tensor_parallel=num_ranks,
        )
        return make_assembly(config, self.work, self.vocab_size, self.cache_folder, attention=attention)


def run_bench_decode(
    *,
    model: str | None,
    shape: str,
    num_principals: int,
    num_adapters: int,
    slots: int,
    num_rows: int,
    mean_length: int,
    max_length: int,
    threads: int,
    candidates: str,
    with_ray: bool,
    json_file: Path | None,
    num_ranks: int = 1,
) -> None:
    """Measure every case, print a table, write the file."""
    if shape not in SHAPES:
        raise ConfigurationError(f"--shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    if candidates != "all" and not (candidates.isascii() and candidates.isdigit() and int(candidates)):
        raise ConfigurationError(f"--candidates must be a number of tokens, at least 1, or all; got {candidates!r}")
    if num_rows < slots:
        raise ConfigurationError(f"--rows must be at least --slots, {slots}, to fill a batch; got {num_rows}")
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(save_random_model(shape, Path(folder) / "model"))
        cache_folder = default_cache_folder(os.environ)
        source = resolve_model(path, cache_folder=cache_folder)
        stated = read_json(LocalTree(Path(source.path)), CONFIG)
        if num_ranks > 1 and (reason := why_not_tensor_parallel(stated, num_ranks)):
            raise ConfigurationError(f"--tensor-parallel must be 1 for {source.name}; got {num_ranks}: {reason}")
        vocab_size = describe_model(source).vocab_size
        adapters: list[str] = []
        if num_adapters:
            adapters = save_random_adapters(
                fetch_weights(source, cache_folder=cache_folder), Path(folder), num_adapters
            )
        roles = ["base", *(f"p{at}" for at in range(num_principals)), *(f"a{at}" for at in range(num_adapters))]
        work = make_work(
            roles, num_rows=num_rows, vocab_size=vocab_size, mean_length=mean_length, max_length=max_length
        )
        num = "all" if candidates == "all" else int(candidates)
        setup = Setup(path, num_principals, adapters, slots, threads, num, vocab_size, work, cache_folder, num_ranks)
        measured = measure(setup, with_ray=with_ray and importlib.util.find_spec("ray") is not None)
    measured["model"] = model or f"random {shape}"
    print_tables(measured)
    if json_file is not None:
        json_file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def measure(setup: Setup, *, with_ray: bool) -> dict[str, Any]:
    """All cases, ready for JSON."""
    torch.set_num_threads(setup.threads)
    plain = load_plain_model(setup.model, setup.cache_folder)
    # on a GPU the two are the same
    modes = ("strict",) if plain.device.type == "cuda" else ("strict", "relaxed")
    engines = {mode: _local_engine(setup.assembly(strict=mode == "strict")) for mode in modes}
    engines["one row"] = _local_engine(setup.assembly(slots=1))
    full_batch = measure_full_batch(setup, plain, engines)
    cases = {"floor": full_batch.pop("floor")}
    for mode in modes:
        name = "local" if mode == "strict" else "local relaxed"
        cases[name] = _decode(engines[mode], setup.work, threads=setup.threads)
    if with_ray:
        cases["ray"] = measure_ray(setup)
    collectives = None
    if setup.num_ranks > 1:
        cases[f"{setup.num_ranks} ranks"], collectives = measure_ranks(setup)
    torch.set_num_threads(setup.threads)
    cases["plain"] = decode_plainly(plain, setup.work, setup.slots)
    few = setup.work.first(max(2, len(setup.work.lengths) // 8))
    cases["batch1"] = _decode(engines["one row"], few, threads=setup.threads)
    local = cases["local"]["tokens_per_s"]
    return {
        "slots": setup.slots,
        "principals": setup.num_principals + len(setup.adapters),
        "adapters": len(setup.adapters),
        "rows": len(setup.work.lengths),
        "threads": setup.threads,
        "candidates": setup.candidates,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "cases": cases,
        "full_batch": full_batch,
        **({} if collectives is None else {"collectives": collectives}),
        "ratios": {f"local to {name}": local / cases[name]["tokens_per_s"] for name in ("plain", "batch1")},
        "peak_memory_mib": _peak_memory_mib(),
    }


def measure_full_batch(setup: Setup, plain: Any, engines: Mapping[str, Engine]) -> dict[str, Any]:
    """A step of a full batch, of one row, and the bare forward pass of as many rows as a full batch, alternately."""
    num_rows = setup.slots * (setup.num_principals + len(setup.adapters) + 1)
    times: dict[str, list[float]] = {name: [] for name in ("floor", *engines)}
    for engine in engines.values():
        _time_steps(engine, setup)  # what is compiled and recorded is not counted
    for _ in range(FULL_BATCH_ROUNDS):
        torch.set_num_threads(setup.threads)
        times["floor"].append(time_floor(plain, num_rows, num_steps=FULL_BATCH_STEPS))
        for name, engine in engines.items():
            times[name].append(_time_steps(engine, setup))
    step_s = {name: statistics.median(each) for name, each in times.items()}
    measured: dict[str, Any] = {
        "floor": {"tokens_per_s": setup.slots / step_s["floor"], "slot_utilisation": 1.0, "forwards_per_step": 1.0,
                  "share": {"forward": 1.0, "solve": 0.0, "transport": 0.0, "wait": 0.0}},
        "step_ms": {name: seconds * 1e3 for name, seconds in step_s.items()},
        "of_floor": {name: _ratio(times["floor"], times[name]) for name in engines if name != "one row"},
        "to_one_row": setup.slots * _ratio(times["one row"], times["strict"]),
    }  # fmt: skip
    row_by_row = _local_engine(setup.assembly(attention="plain"))
    row_by_row_s = _time_steps(row_by_row, setup, num_steps=ROW_BY_ROW_STEPS)
    measured["step_ms"]["row by row"] = row_by_row_s * 1e3
    measured["row_by_row"] = row_by_row_s / step_s["strict"]
    if "relaxed" in engines:
        measured["strict_of_relaxed"] = _ratio(times["relaxed"], times["strict"])
    if plain.device.type == "cuda":
        bandwidth = copy_bandwidth(plain.device)
        lengths = [len(prompt) for each in setup.work.first(setup.slots).prompts for prompt in each.values()]
        num_tokens = statistics.mean(lengths) + FULL_BATCH_STEPS / 2
        bound_s = bytes_a_pass(plain, num_rows, num_tokens) / bandwidth
        measured["bandwidth_tb_per_s"] = bandwidth / 1e12
        measured["step_ms"]["memory bound"] = bound_s * 1e3
        measured["of_memory_bound"] = {name: bound_s / step_s[name] for name in ("floor", "strict")}
    return measured


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median, over rounds, of what the first took to what the second took."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def measure_ray(setup: Setup) -> dict[str, Any]:
    """This decoder with its host in an actor of a local Ray cluster."""
    from pipeline.cluster.host_groups import one_replica
    from pipeline.cluster.stream import cluster

    assembly = setup.assembly()
    with cluster(assembly, is_verbose=False), one_replica(assembly) as hosts:
        return _decode(make_engine(assembly, hosts), setup.work, threads=setup.threads)


def measure_ranks(setup: Setup) -> tuple[dict[str, Any], dict[str, float]]:
    """This decoder with its host split over ranks; and what these send each other in a step."""
    assembly = setup.assembly(num_ranks=setup.num_ranks)
    host = start_hosts(assembly, wiring=Wiring(wrap_host=CountingRanks())).base
    assert isinstance(host, RankGroupHost)
    try:
        case = _decode(make_engine(assembly, Hosts.lone(host, runs_ahead=False)), setup.work, threads=setup.threads)
        num_steps, num_calls, num_bytes = host.ask("collectives")
    finally:
        host.close()
    return case, {"per_step": num_calls / num_steps, "bytes_per_step": num_bytes / num_steps}


def _local_engine(assembly: Assembly) -> Engine:
    return make_engine(assembly, start_hosts(assembly))


def _time_steps(engine: Engine, setup: Setup, *, num_steps: int = FULL_BATCH_STEPS) -> float:
    """Median seconds of a step while every slot runs."""
    torch.set_num_threads(setup.threads)
    for row in setup.work.first(engine.num_slots).rows:
        engine.admit(replace(row, max_new_tokens=num_steps + 8))
    while engine.num_waiting:
        engine.step()
    seconds = []
    for _ in range(num_steps):
        started_s = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started_s)
    while not engine.is_idle:
        engine.step()
    return statistics.median(seconds)


def _decode(engine: Engine, work: Work, *, threads: int) -> dict[str, Any]:
    """Decode all rows; rates, shares of time and how full the slots were while rows waited."""
    torch.set_num_threads(threads)
    sampler = engine.calls.hosts.sampler
    assert sampler is not None, "all roles are of one model here"
    steps_before, row_steps_before, wait_before_s = engine.num_steps, engine.num_row_steps, engine.calls.wait_s
    before = sampler.work().result()
    waiting = iter(work.rows)
    num_tokens, is_last, utilisation = 0, False, 1.0
    started_s = time.perf_counter()
    while not (is_last and engine.is_idle):
        while engine.wants_row and not is_last:
            row = next(waiting, None)
            if row is None:
                is_last = True
                if num_steps := engine.num_steps - steps_before:  # otherwise no row ever waited
                    utilisation = (engine.num_row_steps - row_steps_before) / (num_steps * engine.num_slots)
            else:
                engine.admit(row)
        num_tokens += sum(record.num_tokens for record in engine.step())
    seconds = time.perf_counter() - started_s
    after = sampler.work().result()
    forward, solve = (after.forward_s - before.forward_s) / seconds, (after.solve_s - before.solve_s) / seconds
    transport = max(0.0, (engine.calls.wait_s - wait_before_s) / seconds - forward - solve)
    return {
        "tokens_per_s": num_tokens / seconds,
        "tokens": num_tokens,
        "seconds": seconds,
        "slot_utilisation": utilisation,
        "forwards_per_step": (after.num_forwards - before.num_forwards) / (engine.num_steps - steps_before),
        "share": {"forward": forward, "solve": solve, "transport": transport,
                  "wait": max(0.0, 1 - forward - solve - transport)},
    }  # fmt: skip


def _peak_memory_mib() -> float:
    """Of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_tables(measured: dict[str, Any]) -> None:
    """The cases, then what a full batch costs."""
    console = Console()
    head = ", ".join(f"{measured[what]} {what}" for what in HEAD)
    table = Table(title=f"{measured['model']} on {measured['device']}: {head}", box=None)
    for name in ("case", "tokens/s", "slots in use", "passes/step", "forward", "solve", "transport", "other"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for name, case in measured["cases"].items():
        share = case["share"]
        table.add_row(
            name,
            f"{case['tokens_per_s']:.1f}",
            f"{case['slot_utilisation']:.1%}",
            f"{case['forwards_per_step']:.2f}",
            *(f"{share[part]:.1%}" for part in ("forward", "solve", "transport", "wait")),
        )
    console.print(table)
    full = measured["full_batch"]
    steps = ", ".join(f"{name} {ms:.1f} ms" for name, ms in full["step_ms"].items())
    console.print(f"a step of a full batch: {steps}")
    shares = ["of the floor: " + ", ".join(f"{name} {share:.1%}" for name, share in full["of_floor"].items())]
    if "strict_of_relaxed" in full:
        shares.append(f"strict against relaxed {full['strict_of_relaxed']:.1%}")
    console.print("; ".join([*shares, f"tokens/s to one row at a time {full['to_one_row']:.2f} x"]))
    console.print(f"row by row, as families are decoded that slots do not serve: {full['row_by_row']:.1f} x the time")
    if "of_memory_bound" in full:
        console.print(
            f"of what memory allows ({full['bandwidth_tb_per_s']:.2f} TB/s in a copy): "
            + ", ".join(f"{name} {share:.1%}" for name, share in full["of_memory_bound"].items())
        )
    if (sent := measured.get("collectives")) is not None:
        console.print(
            f"ranks: {sent['per_step']:.0f} collectives a step, to which each gives "
            f"{sent['bytes_per_step'] / 1024:,.1f} KiB"
        )
    console.print(", ".join(f"{name}: {ratio:.2f} x" for name, ratio in measured["ratios"].items()))
    console.print(f"peak memory {measured['peak_memory_mib']:,.0f} MiB")
