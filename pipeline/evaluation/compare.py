"""A comparison of systems on the prompts that all of them answered: paired by prompt, with intervals.

S bootstrap samples, of which the first is the data itself; Y systems, P prompts, N samples per prompt.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.errors import ConfigurationError
from pipeline.evaluation.config import BootstrapConfig
from pipeline.evaluation.judges.interface import Judge, why_missing
from pipeline.evaluation.metrics import Floats, interval
from pipeline.evaluation.significance import holm, prompts_for, smallest_difference, t_p_value, widened
from pipeline.evaluation.systems import System, SystemAnswer
from pipeline.quoting import quote
from pipeline.records import Message

TIE = 1e-9  # scores that differ by less, as a share of the judge's largest one, are equal up to rounding

# what chat templates write around answers, and reasoning; nobody reads them, and judges would
MARKUP = re.compile(r"<\|\w{1,40}\|>|<(?:start|end)_of_turn>|</?think>|</s>|\[/?INST\]")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of all systems on the prompts that they share.

    Args:
        names: of the systems.
        row_ids: the prompts.
        scores: by judge [Y, P, N]; NaN where there is no such sample or no score.
        kl: mean nats per token of each system; None where it is not known.
        cut: share of each system's answers that ended at their limit; None where it is not known.
        num_left_out: prompts that some system has not answered.
        num_repeated: prompts that are equal to another one, which has another id.
        notes: sentences on texts that are not what a user would read.
        missing: by judge, how many answers it gave no score, by reason; judges that gave all are left out.
    """

    names: tuple[str, ...]
    row_ids: tuple[str, ...]
    scores: Mapping[str, Floats]
    kl: tuple[float | None, ...]
    cut: tuple[float | None, ...]
    num_left_out: int
    num_repeated: int = 0
    notes: tuple[str, ...] = ()
    missing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def score_systems(
    systems: Sequence[System], judges: Mapping[str, Judge], *, prompt_readers: Sequence[str] = ()
) -> Scored:
    """Judge all systems' answers to the prompts that all of them answered.

    An answer without its prompt is judged with the prompt that another system says for its id, so that judges read
    the same conversation of all systems.

    Args:
        systems: the first is what others are compared with.
        judges: by name.
        prompt_readers: names of judges that need prompts.

    Raises:
        ConfigurationError: there are fewer than two systems, no common prompts, one id has different prompts, or a
            judge that reads prompts has none.
    """
    if len(systems) < 2:
        raise ConfigurationError(f"a comparison needs two systems or more; got {len(systems)}")
    ids = [{answer.row_id for answer in system.answers} for system in systems]
    common, every = set.intersection(*ids), set.union(*ids)
    if not common:
        shown = "; ".join(
            f"{system.name}: {quote(min(own))}" for system, own in zip(systems, ids, strict=True) if own
        )
        raise ConfigurationError(f"no prompt was answered by all systems; their ids, for example: {shown}")
    prompts = _prompts_of(systems, common)
    if prompt_readers and (without := min(common - set(prompts), default=None)) is not None:
        raise ConfigurationError(
            f"the judge {prompt_readers[0]} reads prompts, and no system says that of {quote(without)}; give the "
            "lines of a file a field prompt"
        )
    row_ids = tuple(sorted(common))
    place = {row_id: at for at, row_id in enumerate(row_ids)}
    num_samples = 1 + max(answer.sample for system in systems for answer in system.answers if answer.row_id in common)
    scores = {name: np.full((len(systems), len(row_ids), num_samples), np.nan) for name in judges}
    missing: dict[str, Counter[str]] = {name: Counter() for name in judges}
    kept = [[answer for answer in system.answers if answer.row_id in common] for system in systems]
    for name, judge in judges.items():
        for at, answers in enumerate(kept):
            where = [place[answer.row_id] for answer in answers], [answer.sample for answer in answers]
            found = judge.score([replace(each.judged, prompt=prompts.get(each.row_id, ())) for each in answers])
            scores[name][at, *where] = found
            missing[name].update(why_missing(score) for score in found if not math.isfinite(score))
    return Scored(
        names=tuple(system.name for system in systems),
        row_ids=row_ids,
        scores=scores,
        kl=tuple(_mean([answer.kl_per_token for answer in answers]) for answers in kept),
        cut=tuple(_mean([answer.was_cut for answer in answers]) for answers in kept),
        num_left_out=len(every) - len(common),
        num_repeated=len(prompts) - len({str(_plain(prompt)) for prompt in prompts.values()}),
        notes=tuple(note for system, answers in zip(systems, kept, strict=True) for note in _notes(system, answers)),
        missing={name: dict(reasons) for name, reasons in missing.items() if reasons},
    )


def scored_answers(systems: Sequence[System], scored: Scored) -> Iterator[Json]:
    """Every answer that was judged, with its prompt and its scores by judge; None for no score."""
    prompts = _prompts_of(systems, set(scored.row_ids))
    place = {row_id: at for at, row_id in enumerate(scored.row_ids)}
    for at, system in enumerate(systems):
        for answer in system.answers:
            if answer.row_id not in place:
                continue
            key = at, place[answer.row_id], answer.sample
            yield {
                "answered_by": system.name,
                "row_id": answer.row_id,
                "sample": answer.sample,
                "prompt": list(prompts.get(answer.row_id, ())),
                "response": answer.judged.text,
                "scores": {judge: _number(scores_YPN[key]) for judge, scores_YPN in scored.scores.items()},
            }


def compare(scored: Scored, bootstrap: BootstrapConfig) -> Json:
    """Means of every system and judge, and every system's difference from the first one, as plain values.

    A prompt without a score under one system is left out of all, of this judge: every mean is over the same prompts.
    Intervals resample prompts, and within each prompt its samples; a difference uses the same prompts on both sides.
    p values are two-sided and adjusted for all differences of the comparison by Holm's method.
    """
    scored = replace(scored, scores={judge: _of_all(scores) for judge, scores in scored.scores.items()})
    counts_SP, means = _resampled(scored, bootstrap)
    num_prompts = {judge: int(np.isfinite(means_SYP[0]).all(0).sum()) for judge, means_SYP in means.items()}
    systems = []
    for at, name in enumerate(scored.names):
        entry: Json = {"system": name, "kl_per_token": scored.kl[at], "share_cut": scored.cut[at], "scores": {}}
        for judge, means_SYP in means.items():
            mean_S = _over_prompts(means_SYP[:, at], counts_SP)
            entry["scores"][judge] = {
                "mean": _number(mean_S[0]),
                "interval": _interval(mean_S, bootstrap, num_prompts[judge]),
            }
        systems.append(entry)
    differences = [
        _difference(scored, judge, at, means[judge], counts_SP, bootstrap)
        for judge in scored.scores
        for at in range(1, len(scored.names))
    ]
    for difference, adjusted in zip(differences, holm([each["p"] for each in differences]), strict=True):
        difference["p_adjusted"] = adjusted
    return {
        "baseline": scored.names[0],
        "num_prompts": len(scored.row_ids),
        "num_prompts_left_out": scored.num_left_out,
        "num_prompts_repeated": scored.num_repeated,
        "notes": list(scored.notes),
        "num_prompts_by_judge": num_prompts,
        "answers_without_a_score": {name: dict(reasons) for name, reasons in scored.missing.items()},
        "bootstrap": bootstrap.model_dump(mode="json"),
        "systems": systems,
        "differences": differences,
    }


def _notes(system: System, answers: Sequence[SystemAnswer]) -> Iterator[str]:
    """Sentences on a system's answers that have no text, or more than text."""
    if num_empty := sum(not answer.judged.text.strip() for answer in answers):
        yield f"{_answers(num_empty)} of {system.name}: no text. Judges score that, too: it repeats nothing."
    marked = [found for answer in answers if (found := MARKUP.search(answer.judged.text))]
    if marked:
        yield (
            f"{_answers(len(marked))} of {system.name}: what looks like a chat template's tokens or reasoning, such "
            f"as {quote(marked[0].group())}, which is judged as it is."
        )


def _answers(count: int) -> str:
    return f"{count:,} answer{'s' * (count > 1)}"


def _of_all(scores_YPN: Floats) -> Floats:
    """The scores of the prompts that have one under every system; NaN elsewhere."""
    is_whole_P1 = np.isfinite(scores_YPN).any(2).all(0).reshape(-1, 1)
    kept_YPN: Floats = np.where(is_whole_P1, scores_YPN, np.nan)
    return kept_YPN


def _prompts_of(systems: Sequence[System], common: set[str]) -> dict[str, Sequence[Message]]:
    """By id the prompt, of the systems that say it. Raises ConfigurationError where one id has different prompts."""
    known: dict[str, Sequence[Message]] = {}
    for system in systems:
        for answer in system.answers:
            if answer.row_id not in common or not answer.judged.prompt:
                continue
            if _plain(known.setdefault(answer.row_id, answer.judged.prompt)) != _plain(answer.judged.prompt):
                raise ConfigurationError(f"the prompt {quote(answer.row_id)} of {system.name} is not the others'")
    return known


def _plain(prompt: Sequence[Message]) -> list[tuple[str, str]]:
    return [(str(message.get("role")), str(message.get("content"))) for message in prompt]


def _resampled(scored: Scored, bootstrap: BootstrapConfig) -> tuple[Floats, Mapping[str, Floats]]:
    """How often each prompt counts [S, P], and by judge each prompt's mean over its (resampled) samples [S, Y, P]."""
    generator = np.random.default_rng(bootstrap.seed)
    num_prompts = len(scored.row_ids)
    draws_SP = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=bootstrap.samples)
    counts_SP: Floats = np.concatenate([np.ones((1, num_prompts)), draws_SP.astype(np.float64)])
    means = {}
    for judge, scores_YPN in scored.scores.items():
        num_samples = scores_YPN.shape[2]
        mean_YP = _nan_mean(scores_YPN)
        if num_samples == 1:
            means[judge] = np.broadcast_to(mean_YP, (1 + bootstrap.samples, *mean_YP.shape))
            continue
        means_SYP = np.empty((1 + bootstrap.samples, *mean_YP.shape))
        means_SYP[0] = mean_YP
        known_YPN = np.isfinite(scores_YPN)
        counts_YP1 = known_YPN.sum(2, keepdims=True)
        # known scores first: a system may have fewer samples than another one
        sorted_YPN = np.take_along_axis(scores_YPN, np.argsort(~known_YPN, axis=2, kind="stable"), 2)
        is_drawn_YPN = np.arange(num_samples) < counts_YP1
        for at in range(1, 1 + bootstrap.samples):
            chosen_YPN = (generator.random(scores_YPN.shape[1:])[None] * counts_YP1).astype(np.int64)
            drawn_YPN = np.take_along_axis(sorted_YPN, chosen_YPN, 2)
            means_SYP[at] = _nan_mean(np.where(is_drawn_YPN, drawn_YPN, np.nan))
        means[judge] = means_SYP
    return counts_SP, means


def _difference(
    scored: Scored, judge: str, at: int, means_SYP: Floats, counts_SP: Floats, bootstrap: BootstrapConfig
) -> Json:
    lead_SP = means_SYP[:, at] - means_SYP[:, 0]
    difference_S = _over_prompts(lead_SP, counts_SP)
    lead_P = lead_SP[0][np.isfinite(lead_SP[0])]
    deviation = float(lead_P.std(ddof=1)) if len(lead_P) > 1 else math.nan
    known = np.abs(means_SYP[0][np.isfinite(means_SYP[0])])
    size = float(known.max()) if known.size else 0.0
    return {
        "judge": judge,
        "system": scored.names[at],
        "difference": _number(difference_S[0]),
        "interval": _interval(difference_S, bootstrap, len(lead_P)),
        "p": t_p_value(float(difference_S[0]), deviation, len(lead_P), size=size),
        "wins": int((lead_P > TIE * size).sum()),
        "ties": int((abs(lead_P) <= TIE * size).sum()),
        "losses": int((lead_P < -TIE * size).sum()),
        "prompts_for_this_difference": prompts_for(float(difference_S[0]), deviation),
        "smallest_difference_to_find": smallest_difference(deviation, len(lead_P)),
    }


def _over_prompts(values_SP: Floats, counts_SP: Floats) -> Floats:
    """Means over prompts, each sample by its own counts: [S]."""
    known_SP = np.isfinite(values_SP)
    number_S = (counts_SP * known_SP).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_S: Floats = (counts_SP * np.where(known_SP, values_SP, 0.0)).sum(1) / number_S
    return means_S


def _nan_mean(scores: Floats) -> Floats:
    known = np.isfinite(scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = np.where(known, scores, 0.0).sum(-1) / known.sum(-1)
    return mean


def _interval(samples_S: Floats, bootstrap: BootstrapConfig, num_prompts: int) -> list[float] | None:
    known_S = samples_S[1:][np.isfinite(samples_S[1:])]
    return list(interval(known_S, widened(bootstrap.confidence, num_prompts))) if len(known_S) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
