"""The job that makes training data: prompts in, answers by the relabel job, a filtered and paired data set out."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from pipeline.errors import ConfigurationError
from pipeline.evaluation.panel import resolve_panel
from pipeline.evaluation.scores import SCORES, Scores
from pipeline.points import Watcher, unwatched
from pipeline.runtime.topology import adapters_of, models_of
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
    watch: Watcher = unwatched,
) -> tuple[Dataset, bool]:
    """Start or continue a run, judge its answers, make the data set; it, and whether anything was decoded or judged.

    The run is that of `cage relabel` with the same settings; `may_begin_beside` as there. Other settings of
    `synthesis` make another data set of the same answers.

    Raises:
        ConfigurationError: nothing was decoded, or no answer is left for the data set.
        ErrorBudgetExceeded, CageError: as `relabel`.
    """

    def tell(line: str) -> None:
        print(line, file=out, flush=True)

    settings = config.synthesis
    _check_licences(config)
    if settings.filters.duplicates.near is not None:
        check_installed()
    panel = resolve_panel(settings.judges, cache_folder, progress=tell)
    run, was_decoded = relabel(
        config.job, cache_folder, out, is_verbose=is_verbose, may_begin_beside=may_begin_beside, watch=watch
    )
    num_judged = judge(Scores(run, panel), config, out, is_verbose=is_verbose) if settings.judges else 0
    dataset = make_dataset(
        run,
        settings,
        lambda name: read_candidates(run, name, SCORES if settings.judges else None),
        judges=JudgeIdentities(panel.digest, {name: source.identity for name, source in panel.sources.items()}),
        progress=tell,
    )
    return dataset, was_decoded or num_judged > 0


def _check_licences(config: SynthesizeConfig) -> None:
    """Raise ConfigurationError when a licence is stated of something that the run does not use."""
    places = ["input", *(place for place, _ in models_of(config)), *(place for place, _ in adapters_of(config))]
    for place in config.synthesis.licences:
        if place not in places:
            raise ConfigurationError(
                f"synthesis.licences.{place}: the run uses no such thing; it uses {', '.join(places)}"
            )
