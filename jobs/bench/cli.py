"""`cage bench`: what the benchmarks can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(help="Benchmarks: every comparison in one run, side by side.", no_args_is_help=True)


@bench.command("solver")
def bench_solver(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and repetitions.")] = False,
    sweep: Annotated[int, typer.Option("--sweep", help="Also solve this many games a cell, of every kind.")] = 0,
    threads: Annotated[int, typer.Option("--threads", help="torch threads; the paper's solver uses one.")] = 1,
) -> None:
    """Games per second, iterations and distance from the equilibrium, by method."""
    from jobs.bench.solver import run_bench_solver

    run_bench_solver(quick=quick, games_per_cell=sweep, threads=threads, json_file=json_file)


@bench.command("rules")
def bench_rules(
    games: Annotated[int, typer.Option(min=1, help="Games of each kind.")] = 600,
    principals: Annotated[int, typer.Option(min=1, help="Principals of each game.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements to this file.")] = None,
) -> None:
    """What each rule gains at equal KL when token rewards are a true signal and noise."""
    from jobs.bench.rules import run_bench_rules

    run_bench_rules(games=games, principals=principals, json_file=json_file)


@bench.command("decode")
def bench_decode(
    model: Annotated[
        str | None, typer.Option(help="Folder, hub id, or smollm2-135m; without it, random weights.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Shape of random weights: 1M, 135M, 180M-MoE, 1B or 7B.")] = "135M",
    principals: Annotated[int, typer.Option(min=0, help="Prompted principals.")] = 2,
    adapters: Annotated[
        int, typer.Option(min=0, help="Principals that are LoRA adapters; floor and plain loop go without.")
    ] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Prompts.")] = 64,
    mean_length: Annotated[int, typer.Option(min=1, help="Mean of the answers' geometric lengths, in tokens.")] = 64,
    max_length: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="torch threads of every case.")] = 1,
    candidates: Annotated[str, typer.Option(help="Tokens that take part in a game: a number, or all.")] = "50",
    ray: Annotated[bool, typer.Option(help="Measure the decoder over Ray, too.")] = True,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Measure it split over so many ranks, too.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements to this file.")] = None,
) -> None:
    """This decoder beside bare forward passes, over Ray, a plain transformers loop, and one row at a time."""
    from jobs.bench.decode import run_bench_decode

    run_bench_decode(
        model=model,
        shape=shape,
        num_principals=principals,
        num_adapters=adapters,
        slots=slots,
        num_rows=rows,
        mean_length=mean_length,
        max_length=max_length,
        threads=threads,
        candidates=candidates,
        with_ray=ray,
        num_ranks=tensor_parallel,
        json_file=json_file,
    )


@bench.command("coordination")
def bench_coordination(
    forward_ms: Annotated[list[float], typer.Option(min=0.1, help="Length of a simulated forward pass.")] = [10, 25],  # noqa: B006
    hosts: Annotated[list[int], typer.Option(min=1, help="Hosts of one replica.")] = [1, 2, 4, 8],  # noqa: B006
    replicas: Annotated[list[int], typer.Option(min=1, help="Replicas of two hosts.")] = [1, 2, 4],  # noqa: B006
    slots: Annotated[int, typer.Option(min=1, help="Rows at once per replica.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.5, help="Measured time of each cell.")] = 5.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements to this file.")] = None,
) -> None:
    """What calls, games and bookkeeping cost over Ray, beside hosts that never wait."""
    from jobs.bench.coordination import run_bench_coordination

    run_bench_coordination(
        forwards_ms=forward_ms, hosts=hosts, replicas=replicas, slots=slots, seconds=seconds, json_file=json_file
    )


@bench.command("startup")
def bench_startup(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each command.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements to this file.")] = None,
) -> None:
    """Time from a command to its answer, beside bare imports: errors, plan, status, inspect, a run's first token."""
    from jobs.bench.startup import run_bench_startup

    run_bench_startup(repeats=repeats, json_file=json_file)


@bench.command("speculation")
def bench_speculation(
    model: Annotated[str, typer.Option(help="Folder, hub id, or smollm2-135m.")] = "smollm2-135m",
    prompts: Annotated[Path, typer.Option(help="JSONL with the columns id and prompt.")] = Path(
        "configs/data/prompts.jsonl"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    slots: Annotated[list[int], typer.Option(min=1, help="Rows at once.")] = [1, 4, 16],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs, of which the median counts.")] = 1,
    workload: Annotated[
        list[str], typer.Option(help="Beginnings of names: relabel, grid, synthesis, weak-to-strong; all without.")
    ] = [],  # noqa: B006
    draft_model: Annotated[
        str | None, typer.Option(help="Proposes tokens in weak-to-strong; without it, the base itself.")
    ] = None,
    draft_layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of its first layers propose. "
            "Default: all of a model that is given; of the base five sixths.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto: a GPU where there is one; cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    shape: Annotated[
        str | None, typer.Option(help="Random weights and prompts in place of --model: 1M, 135M, 1B or 7B.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the measurements to this file.")] = None,
) -> None:
    """What drafts save: relabeling, an evaluation grid, synthesis, weak-to-strong, with and without them."""
    from jobs.bench.speculation import run_bench_speculation

    run_bench_speculation(
        model=model,
        prompts=prompts,
        num_rows=rows,
        max_new_tokens=max_new_tokens,
        slots=slots,
        repeats=repeats,
        workloads=workload,
        json_file=json_file,
        draft_model={"model": draft_model, "layers": draft_layers},
        device=device,
        dtype=dtype,
        shape=shape,
    )
