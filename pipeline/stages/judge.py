"""The stage that scores a run's answers, shared by evaluations and data sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from pipeline.config.sections import Config, Transport
from pipeline.evaluation.scores import ScoreFiles

SHOWN = 3  # reasons


def judge(scores: ScoreFiles, config: Config, out: TextIO, *, is_verbose: bool = False) -> int:
    """Score the answers that have no scores yet, and print progress; returns the number of shards scored.

    Judges with models run on actors where the run is on Ray. All others run in this process.

    Args:
        scores: the run and its judges.
        config: the run's configuration, for its transport and cluster.
        out: where progress is printed.
        is_verbose: whether Ray's own log is shown.

    Raises:
        CageError: a judge failed; scores that are written are kept.
    """
    num_scored = 0
    for _ in _score(scores, config, is_verbose=is_verbose):
        num_scored += 1
        print(f"judged {num_scored:,} shards of {len(scores.run.plan.shards):,}", file=out, flush=True)
    if num_scored:
        for line in describe_failures(scores):
            print(f"warning: {line}", file=out, flush=True)
    return num_scored


def describe_failures(scores: ScoreFiles) -> list[str]:
    """A line for each judge that gave some answers no score, with their number and the commonest reasons."""
    total = sum(record.rows for record in scores.run.committed().values())
    lines = []
    for judge, reasons in scores.failures().items():
        shown = [f"{reason} ({count:,})" for reason, count in reasons.most_common(SHOWN)]
        if (rest := len(reasons) - SHOWN) > 0:
            shown.append(f"{rest:,} other reasons")
        lines.append(
            f"judge {judge} gave no score for {reasons.total():,} of {total:,} answers: {'; '.join(shown)}; they are "
            "left out, and never counted as 0"
        )
    return lines


def _score(scores: ScoreFiles, config: Config, *, is_verbose: bool) -> Iterator[None]:
    pending = scores.pending()
    if not pending:
        return
    if scores.panel.has_models and config.cluster.transport is Transport.RAY:
        from pipeline.cluster.scoring import score_shards  # imports ray: seconds

        yield from score_shards(scores, pending, config, is_verbose=is_verbose)
        return
    judges = scores.panel.load()
    for record in pending:
        scores.score(record, judges)
        yield
