"""The landscape: the means of everything compared, with bootstrap samples of all of them at once.

S samples, of which the first is the data itself; V variants, M objectives, P prompts, W weight vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.config.sections import RuleName
from pipeline.evaluation.config import BootstrapConfig
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.metrics import (
    Floats,
    default_reference,
    front,
    gaps,
    hypervolume,
    interval,
    resample_counts,
    weighted_means,
)


@dataclass(frozen=True, slots=True)
class Landscape:
    """Every variant's mean of every objective, and what to measure it by.

    `judges` names the judge of each objective, in order; an objective has its principal's name. `low_M` and `high_M`
    bound the means of everything compared, by which an objective is normalised; `weights_VM` sum to 1 over the
    objectives (NaN where all are 0).
    """

    data: Measurements
    judges: Mapping[str, str]
    means_SVM: Floats
    kl_SV: Floats
    counts_SP: Floats
    weights_VM: Floats
    low_M: Floats
    high_M: Floats
    reference_M: Floats
    confidence: float

    def normalised(self, values: Floats) -> Floats:
        """Values [..., M] from 0, the lowest mean of everything compared, to 1, the highest."""
        range_M = self.high_M - self.low_M
        scaled: Floats = np.where(range_M > 0, (values - self.low_M) / np.where(range_M > 0, range_M, 1.0), 0.0)
        return scaled

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.judges)

    def weight_vectors(self) -> Floats:
        """The different weight vectors, [W, M], without those of zeros alone."""
        known = self.weights_VM[np.isfinite(self.weights_VM).all(1)]
        vectors: Floats = np.unique(known, axis=0) if len(known) else known
        return vectors

    def mean_inner_products(self, variants: Iterable[int]) -> Floats:
        """The mean of w . r over the variants, [S]; the base is held to every weight vector."""
        found = []
        for at in variants:
            normal_SM = self.normalised(self.means_SVM[:, at])
            if self.data.variants[at].rule is RuleName.BASE:
                found += [normal_SM @ vector_M for vector_M in self.weight_vectors()]
            elif np.isfinite(self.weights_VM[at]).all():
                found.append(normal_SM @ self.weights_VM[at])
        return np.mean(found, axis=0) if found else np.full(len(self.means_SVM), np.nan)

    def worst_principals(self, variants: Iterable[int]) -> Floats:
        """The mean over the variants of the least normalised objective, [S]."""
        worst_SV = self.normalised(self.means_SVM[:, list(variants)]).min(2)
        mean_S: Floats = worst_SV.mean(1)
        return mean_S

    def hypervolumes(self, variants: Iterable[int]) -> Floats:
        """The hypervolume of the variants' points, [S]."""
        chosen_SVM = self.means_SVM[:, list(variants)]
        return np.array([hypervolume(points_VM, self.reference_M) for points_VM in chosen_SVM])

    def sparsity(self, variants: Iterable[int]) -> float | None:
        """Of the front of normalised points; None for a front of one."""
        gaps_M = gaps(front(self.normalised(self.means_SVM[0, list(variants)])))
        return None if gaps_M is None else float(gaps_M.sum())

    def interval(self, samples_S: Floats) -> list[float] | None:
        """The bootstrap interval of a statistic whose first sample is the estimate."""
        known = samples_S[1:][np.isfinite(samples_S[1:])]
        return list(interval(known, self.confidence)) if len(known) else None


def survey(
    data: Measurements,
    judge_by_objective: Mapping[str, str],
    reference: Mapping[str, float] | None,
    bootstrap: BootstrapConfig,
) -> Landscape:
    """Resample the prompts and average. `reference` None: see `metrics.default_reference`."""
    counts_SP = resample_counts(len(data.row_ids), bootstrap.samples, bootstrap.seed)
    scores = [data.scores_by_judge[judge] for judge in judge_by_objective.values()]
    means_SVM = np.stack([weighted_means(score_VP, counts_SP) for score_VP in scores], axis=2)
    points_VM = means_SVM[0]
    weights_VM = np.array(
        [[(variant.weights or {}).get(name, 0.0) for name in judge_by_objective] for variant in data.variants]
    )
    with np.errstate(invalid="ignore"):
        weights_VM = weights_VM / weights_VM.sum(1, keepdims=True)
    return Landscape(
        data=data,
        judges=judge_by_objective,
        means_SVM=means_SVM,
        kl_SV=weighted_means(data.numbers["kl_per_token"], counts_SP),
        counts_SP=counts_SP,
        weights_VM=weights_VM,
        low_M=points_VM.min(0),
        high_M=points_VM.max(0),
        reference_M=default_reference(points_VM)
        if reference is None
        else np.array([reference[name] for name in judge_by_objective]),
        confidence=bootstrap.confidence,
    )
