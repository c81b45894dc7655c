"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.monitoring.events import LogFormat

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file; see configs/ for one per situation.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.SUB=VALUE]...",
        help="Changes to the configuration, such as decoding.temperature=0.7 principals.brief.weight=0.2.",
        show_default=False,
    ),
]
Limit = Annotated[int | None, typer.Option(help="First rows only (input.limit).")]
Seed = Annotated[int | None, typer.Option(help="Seed of the draws (decoding.seed).")]
Model = Annotated[str | None, typer.Option(help="Base model (base.model).")]
Revision = Annotated[str | None, typer.Option(help="Revision of the base model (base.revision).")]
Dtype = Annotated[str | None, typer.Option(help="dtype of the base model (base.dtype).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the base's repository (base.trust_remote_code).")
]
NewRun = Annotated[
    bool,
    typer.Option(
        "--new-run", help="If output.path holds a run with other settings, write to PATH-2 (or PATH-3, ...)."
    ),
]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="If the input has grown since the run was planned (new files, or rows at the end of files), answer its "
        "new rows in the same run. A larger --limit needs no option.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of Ray and its workers.")]
Log = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        help="text for people, or json: one event a line on standard error, results and errors included, without "
        "anything that prompts or answers say (unless with --verbose).",
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the whole configuration, defaults included, and stop.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="ID", help="The row with this id alone; may be given repeatedly."),
]
Mended = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="A mended input with the same ids (file, folder or s3://): its rows that failed in RUN, or that RUN "
        "has with other content, are run again.",
    ),
]
PlannedFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; it may also be given as the first argument.")
]
GpuName = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="Plan for GPUs of this kind, such as a100-80gb, here or not."),
]
Price = Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour, in any currency: prices the run.")]
Like = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Reckon with the measured tokens per second and per answer of this run."),
]
TokensPerSecond = Annotated[
    float | None,
    typer.Option("--throughput", min=1e-6, help="Tokens a second of one replica, not measured."),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, local or s3://.")]
