"""The stage of `cage advise` that needs models: the base answers a few prompts, and every game is recorded."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TextIO

from pipeline.advice.recording import RecordedGames, Recorder
from pipeline.advice.settings import AdviseConfig
from pipeline.engine.engine import decode_rows
from pipeline.inputs.source import open_input
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts

SHOWN_EVERY = 10  # answers


def record_games(config: AdviseConfig, cache_folder: Path, out: TextIO) -> RecordedGames:
    """Answer the first prompts by the base alone, in this process, and keep every principal's q at all candidates.

    Args:
        config: the job; `config.advise` says how many prompts, and which views are recorded as well.
        cache_folder: where downloaded and converted weights are kept.
        out: where progress is printed.

    Raises:
        ConfigurationError: the input or a model cannot be used, or no prompt could be answered.
        HostError: a model failed.
    """

    def report(line: str) -> None:
        print(line, file=out, flush=True)

    job = config.recording
    rows = list(islice(open_input(job.input, tuple(config.principals)), config.advise.prompts))
    assembly = assemble(job, cache_folder, progress=report)
    # a lone host would solve its games by itself; without its game spec it proposes, and they are solved here
    base, *others = assembly.hosts
    assembly = replace(assembly, hosts=(replace(base, games=None), *others))
    report(f"recording the games of {len(rows):,} prompts")
    engine = make_engine(assembly, start_hosts(assembly))
    recorder = Recorder(tuple(job.principals))
    engine.calls.observer = recorder
    failed = set()
    for number, record in enumerate(decode_rows(engine, rows), 1):
        if record.error is not None:
            failed.add(record.row_id)
            report(f"row {record.row_id} failed: {record.error}")
        if number % SHOWN_EVERY == 0 or number == len(rows):
            report(f"{number:,} of {len(rows):,} prompts")
    return replace(recorder.games(frozenset(failed)), settings=config.recorded)
