"""The evaluation job: decode a grid, judge the answers, compare the rules. Each stage continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from pipeline.evaluation import summary
from pipeline.evaluation.bootstrap import resample
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.equal_kl import weighted_scores
from pipeline.evaluation.measurements import measure, tokens_per_second
from pipeline.evaluation.metrics import check_hypervolume
from pipeline.evaluation.notes import notes, overlaps
from pipeline.evaluation.panel import Panel, resolve_panel
from pipeline.evaluation.reading import reading
from pipeline.evaluation.scores import ScoreFiles
from pipeline.stages.judge import describe_failures, judge
from pipeline.stages.relabel import relabel
from pipeline.storage.run import Run

METRICS = "_metrics.json"
VERSION = 5  # raise it when the same scores give another _metrics.json


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished evaluation.

    Args:
        run: its run.
        metrics: what _metrics.json holds.
        was_run: whether anything was decoded, judged or computed; False where all of it was there.
    """

    run: Run
    metrics: dict[str, Any]
    was_run: bool


def evaluate(
    config: EvaluateConfig,
    cache_folder: Path,
    out: TextIO,
    *,
    is_verbose: bool = False,
    may_begin_beside: bool = False,
    may_extend: bool = False,
) -> Evaluation:
    """Start or continue an evaluation, and finish it.

    Args:
        config: the run, its judges and how they are compared.
        cache_folder: where downloaded and converted weights are kept.
        out: where progress is printed.
        is_verbose: whether Ray's own log is shown.
        may_begin_beside, may_extend: as in `relabel`.

    Raises:
        RunMismatch: `output.path` holds a run with other settings.
        ConfigurationError: a judge or a model cannot be used; nothing was decoded.
        CageError: decoding or judging failed; what is done is kept.
    """
    check_hypervolume()
    panel = resolve_panel(
        config.evaluation.judges, cache_folder, progress=lambda line: print(line, file=out, flush=True)
    )
    run, was_decoded = relabel(
        config, cache_folder, out, is_verbose=is_verbose, may_begin_beside=may_begin_beside, may_extend=may_extend
    )
    scores = ScoreFiles(run, panel)
    num_scored = judge(scores, config, out, is_verbose=is_verbose)
    digest = _digest(run, panel, config)
    known = _stored(run)
    if not (was_decoded or num_scored) and known is not None and known.get("digest") == digest:
        return Evaluation(run, known, was_run=False)
    metrics = {"digest": digest, **compute_metrics(run, scores, config)}
    run.store.put(METRICS, json.dumps(metrics, ensure_ascii=False, allow_nan=False, indent=1).encode() + b"\n")
    return Evaluation(run, metrics, was_run=True)


def compute_metrics(run: Run, scores: ScoreFiles, config: EvaluateConfig) -> dict[str, Any]:
    """The comparison of everything that the run answered, as plain values."""
    variants = [replace(each, weights=each.weights or config.weights) for each in run.plan.variants]
    data = measure(
        scores.tables(),
        variants,
        judges=list(config.evaluation.judges),
        needed=list(config.objectives.values()),
        num_samples=run.plan.num_samples,
    )
    samples = resample(data, config.objectives, config.evaluation.reference_point, config.evaluation.bootstrap)
    at_equal_kl = weighted_scores(samples)
    differences = summary.differences(samples, at_equal_kl)
    records = run.committed().values()
    return {
        "run": run.plan.digest,
        "objectives": list(samples.objectives),
        "reference_point": dict(zip(samples.objectives, map(float, samples.reference_M), strict=True)),
        "published_reference_point": dict(zip(samples.objectives, map(float, samples.published_point), strict=True)),
        "normalised_from": {
            name: [float(low), float(high)]
            for name, low, high in zip(samples.objectives, samples.low_M, samples.high_M, strict=True)
        },
        "judges": _describe_judges(config, scores.panel, run),
        "bootstrap": config.evaluation.bootstrap.model_dump(mode="json"),
        "num_prompts": len(data.row_ids),
        "num_prompts_left_out": data.num_left_out,
        "num_answers": data.num_answers,
        "num_failed": sum(record.failed for record in records),
        "tokens_per_second": tokens_per_second(records),
        "reading": reading(differences, samples.confidence),
        "notes": [*notes(config, scores.panel, run.plan.models, samples), *describe_failures(scores)],
        "rules": summary.by_rule(samples, at_equal_kl),
        "by_temperature": summary.by_temperature(samples),
        "differences": differences,
        "equal_kl": summary.equal_kl(samples),
        "control": summary.control(samples),
        "win_rates": summary.win_rates(samples),
        "points": summary.points(samples),
    }


def _describe_judges(config: EvaluateConfig, panel: Panel, run: Run) -> dict[str, Any]:
    """Each judge's settings, the principals it measures, and why it is not independent where it is not."""
    why = {judge: reason for _, judge, reason in overlaps(config, panel, run.plan.models)}
    return {
        name: {
            **judge.model_dump(mode="json"),
            "measures": [principal for principal, judge_of in config.objectives.items() if judge_of == name],
            "not_independent": why.get(name),
            "identity": panel.sources[name].identity if name in panel.sources else None,
        }
        for name, judge in config.evaluation.judges.items()
    }


def _digest(run: Run, panel: Panel, config: EvaluateConfig) -> str:
    """A hash of everything that decides _metrics.json."""
    settings = config.evaluation.model_dump(mode="json", exclude={"judges"})
    answers = [sorted(record.sha256_by_file.items()) for record in run.committed().values()]
    text = json.dumps([VERSION, run.plan.digest, answers, panel.digest, settings, config.objectives], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(run: Run) -> dict[str, Any] | None:
    data = run.store.read(METRICS)
    if data is None:
        return None
    try:
        tree = json.loads(data)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None
