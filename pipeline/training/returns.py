"""Returns of answers from a judge, for data that have none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.interface import JudgeConfig, JudgedAnswer, why_missing
from pipeline.evaluation.panel import resolve_panel
from pipeline.training.comparisons import TIE, Answer, Comparison, Drops
from pipeline.training.processes import ALONE, Processes

NO_SCORE = "an answer that the judge cannot score"


def score_comparisons(
    comparisons: Sequence[Comparison],
    judge: JudgeConfig,
    name: str,
    cache_folder: Path,
    drops: Drops,
    processes: Processes = ALONE,
) -> list[Comparison]:
    """The comparisons with the judge's scores as returns and as the only label; what has none is counted.

    Args:
        comparisons: whose labels are not used.
        judge: scores each answer once, in the main process.
        name: of the objective.
        cache_folder: where downloaded weights are kept.
        drops: is added to.
        processes: that need the scores.

    Raises:
        ConfigurationError: the judge cannot be loaded, or measures principals, of which there are none.
        CageError: another process could not ask the judge.
    """
    if judge.measured_principal is not None:
        raise ConfigurationError(
            "training.judge must score answers by themselves; there are no principals to measure"
        )
    keys = dict.fromkeys((str(each.prompt), answer.text) for each in comparisons for answer in each.answers)
    prompts = {str(each.prompt): each.prompt for each in comparisons}

    def ask() -> list[float | str]:
        """The score of each answer, or why it has none."""
        scorer = resolve_panel({name: judge}, cache_folder).load()[name]
        scores = scorer.score([JudgedAnswer(prompts[prompt], text) for prompt, text in keys])
        return [float(score) if math.isfinite(score) else why_missing(score) for score in scores]

    scores = processes.share("scores of training.judge", ask)
    score_of = dict(zip(keys, scores, strict=True))
    judged = []
    for each in comparisons:
        found = [score_of[str(each.prompt), answer.text] for answer in each.answers]
        if reasons := [score for score in found if isinstance(score, str)]:
            drops.add(NO_SCORE, each.place, reasons[0])
        elif found[0] == found[1]:
            drops.add(f"{TIE} for {name}", each.place)
        else:
            one, other = (
                Answer(answer.text, {name: score}) for answer, score in zip(each.answers, found, strict=True)
            )
            judged.append(
                Comparison(each.place, each.file, each.prompt, (one, other), {name: int(found[1] > found[0])})
            )
    return judged
