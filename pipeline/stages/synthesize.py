"""The job that makes training data: decode prompts as `relabel` does, then filter and pair the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from pipeline.errors import ConfigurationError
from pipeline.evaluation.panel import resolve_panel
from pipeline.evaluation.scores import SCORES, ScoreFiles
from pipeline.runtime.topology import adapters_of, models_of
from pipeline.runtime.wiring import DIRECT, Wiring
from pipeline.stages.judge import judge
from pipeline.stages.relabel import relabel
from pipeline.synthesis.candidates import read_candidates
from pipeline.synthesis.dataset import Dataset, JudgeIdentities, make_dataset
from pipeline.synthesis.duplicates import check_installed
from pipeline.synthesis.settings import SynthesizeConfig


def synthesize(
    config: SynthesizeConfig,
    cache_folder: Path,
    out: TextIO,
    *,
    is_verbose: bool = False,
    may_begin_beside: bool = False,
    may_extend: bool = False,
    wiring: Wiring = DIRECT,
) -> tuple[Dataset, bool]:
    """Start or continue a run, judge its answers and make the data set.

    The run is the same as that of `cage relabel` with the same settings. Other settings of `synthesis` make another
    data set from the same answers.

    Args:
        config: the run, and the section `synthesis`.
        cache_folder: where downloaded and converted weights are kept.
        out: where progress is printed.
        is_verbose: whether Ray's own log is shown.
        may_begin_beside, may_extend, wiring: as in `relabel`.

    Returns:
        The data set, and whether anything was decoded or judged.

    Raises:
        ConfigurationError: nothing was decoded, or no answer is left for the data set.
        ErrorBudgetExceeded, CageError: as `relabel`.
    """

    def report(line: str) -> None:
        print(line, file=out, flush=True)

    settings = config.synthesis
    _check_licences(config)
    if settings.filters.duplicates.near is not None:
        check_installed()
    panel = resolve_panel(settings.judges, cache_folder, progress=report)
    run, was_decoded = relabel(
        config.job,
        cache_folder,
        out,
        is_verbose=is_verbose,
        may_begin_beside=may_begin_beside,
        may_extend=may_extend,
        wiring=wiring,
    )
    num_judged = judge(ScoreFiles(run, panel), config, out, is_verbose=is_verbose) if settings.judges else 0
    dataset = make_dataset(
        run,
        settings,
        lambda name: read_candidates(run, name, SCORES if settings.judges else None),
        judges=JudgeIdentities(panel.digest, {name: source.identity for name, source in panel.sources.items()}),
        progress=report,
    )
    return dataset, was_decoded or num_judged > 0


def _check_licences(config: SynthesizeConfig) -> None:
    """Raise ConfigurationError when a licence is stated for something that the run does not use."""
    places = ["input", *(place for place, _ in models_of(config)), *(place for place, _ in adapters_of(config))]
    for place in config.synthesis.licences:
        if place not in places:
            raise ConfigurationError(
                f"synthesis.licences.{place}: the run uses no such thing; it uses {', '.join(places)}"
            )
