"""Means of every variant and objective, with a paired bootstrap over prompts.

All variants are resampled with the same draws of prompts, and of each prompt's samples where there are several. A
difference of two variants is taken within each bootstrap sample. How hard a prompt is then cancels out: a rule that
is a little better on every prompt has a narrow interval, however much the prompts differ.

S samples, of which the first is the data itself; V variants, M objectives, A answers, W weight vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.evaluation.config import BootstrapConfig
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.metrics import (
    Floats,
    default_reference,
    extent,
    front,
    gaps,
    hypervolume,
    interval,
    inverted_generational_distance,
    on_front,
    published_reference,
    resample_counts,
    settled,
    weighted_means,
)
from pipeline.evaluation.significance import widened


@dataclass(frozen=True)
class BootstrapSamples:
    """Every variant's mean of every objective in every bootstrap sample, and the scales to compare them on.

    Methods that return [S] hold the estimate first and then one value per bootstrap sample. Subtract two of them
    sample by sample for a paired difference, and pass the result to `interval`.

    Args:
        data: what was measured.
        judges: by objective the judge that measures it, in order; an objective has its principal's name.
        means_SVM: mean scores over prompts.
        kl_SV: mean KL to the base per token.
        counts_SA: how often each answer counts in each sample.
        weights_VM: weights of the principals, which sum to 1 over the objectives; NaN where all are 0.
        low_M, high_M: lowest and highest mean of each objective over all variants, for `normalised`.
        reference_M: the reference point of the hypervolume.
        confidence: of the intervals, such as 0.95.
    """

    data: Measurements
    judges: Mapping[str, str]
    means_SVM: Floats
    kl_SV: Floats
    counts_SA: Floats
    weights_VM: Floats
    low_M: Floats
    high_M: Floats
    reference_M: Floats
    confidence: float

    def normalised(self, values: Floats) -> Floats:
        """Values [..., M] scaled so that the lowest mean of all variants is 0 and the highest is 1.

        Judges have different units, so scores of several objectives are scaled before they are added or compared.
        The bounds come from the data and are the same in every sample: a bound that moved with the sample would add
        its own noise to every difference. An objective that does not vary is 0.
        """
        range_M = self.high_M - self.low_M
        scaled: Floats = np.where(range_M > 0, (values - self.low_M) / np.where(range_M > 0, range_M, 1.0), 0.0)
        return scaled

    def normalised_lead(self, lead_AM: Floats, weights_M: Floats) -> Floats:
        """w . r of differences of scores [A, M], on the scale of `normalised`: [A]."""
        range_M = self.high_M - self.low_M
        scaled_M = np.where(range_M > 0, weights_M / np.where(range_M > 0, range_M, 1.0), 0.0)
        lead_A: Floats = lead_AM @ scaled_M
        return lead_A

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.judges)

    def weight_vectors(self) -> Floats:
        """The different weight vectors, [W, M], without all-zero ones."""
        known = self.weights_VM[np.isfinite(self.weights_VM).all(1)]
        vectors: Floats = np.unique(known, axis=0) if len(known) else known
        return vectors

    def mean_inner_products(self, variants: Iterable[int]) -> Floats:
        """The mean of w . r over the variants, [S], where r are normalised objectives.

        The base does not depend on weights, so its one point is averaged over all weight vectors: it then answers the
        same question as a rule that was run with each of them.
        """
        found = []
        for at in variants:
            normal_SM = self.normalised(self.means_SVM[:, at])
            if not self.data.variants[at].rule.uses_principals:
                found += [normal_SM @ vector_M for vector_M in self.weight_vectors()]
            elif np.isfinite(self.weights_VM[at]).all():
                found.append(normal_SM @ self.weights_VM[at])
        return np.mean(found, axis=0) if found else np.full(len(self.means_SVM), np.nan)

    def worst_principals(self, variants: Iterable[int]) -> Floats:
        """The mean over the variants of the lowest normalised objective whose weight is not 0, [S].

        A principal without weight asks for nothing, so its objective says nothing about how well it is served. The
        base's one point is averaged over all weight vectors, as in `mean_inner_products`.
        """
        found = []
        for at in variants:
            normal_SM = self.normalised(self.means_SVM[:, at])
            uses_principals = self.data.variants[at].rule.uses_principals
            for vector_M in self.weights_VM[at : at + 1] if uses_principals else self.weight_vectors():
                if np.isfinite(vector_M).all():
                    found.append(normal_SM[:, vector_M > 0].min(1))
        return np.mean(found, axis=0) if found else np.full(len(self.means_SVM), np.nan)

    def hypervolumes(self, variants: Iterable[int], reference_M: Floats | None = None) -> Floats:
        """The hypervolume of the variants' points above the reference point, or above another one, [S]."""
        chosen_SVM = self.means_SVM[:, list(variants)]
        reference_M = self.reference_M if reference_M is None else reference_M
        return np.array([hypervolume(points_VM, reference_M) for points_VM in chosen_SVM])

    @property
    def published_point(self) -> Floats:
        """The reference point of CAGE's public evaluation (`metrics.published_reference`)."""
        return published_reference(self.means_SVM[0])

    def unit_hypervolumes(self, variants: Iterable[int]) -> Floats:
        """The hypervolume of the normalised points above 0, as CAGE's public evaluation normalises it, [S]."""
        normal_SVM = self.normalised(self.means_SVM[:, list(variants)])
        return np.array([hypervolume(points_VM, np.zeros(points_VM.shape[1])) for points_VM in normal_SVM])

    def regrets(self, variants: Iterable[int], objective: int | None = None) -> Floats:
        """How much of its normalised objective a principal loses by sharing, [S]: less is better.

        By principal its objective where it has all weight, under the same method and agent temperature, less that
        where it has some of it; the mean over all such points. NaN without points of one principal.

        Args:
            variants: whose points are compared.
            objective: of the one principal that is asked about; None: the mean over all of them.
        """
        data, lost = self.data, []
        chosen = list(variants)
        for at in chosen:
            for index in map(int, np.flatnonzero((self.weights_VM[at] > 0) & (self.weights_VM[at] < 1))):
                if objective not in (None, index):
                    continue
                alone = next((each for each in chosen if self._is_alone(each, at, index)), None)
                if alone is not None and data.variants[at].rule.uses_principals:
                    lead_SM = self.normalised(self.means_SVM[:, alone]) - self.normalised(self.means_SVM[:, at])
                    lost.append(lead_SM[:, index])
        return np.mean(lost, axis=0) if lost else np.full(len(self.means_SVM), np.nan)

    def _is_alone(self, alone: int, at: int, index: int) -> bool:
        """Whether a variant is like another one, with all weight on one principal."""
        data = self.data
        is_alike = data.method_by_variant[alone] == data.method_by_variant[at]
        temperatures = data.variants[alone].agent_temperature, data.variants[at].agent_temperature
        # a principal that no judge measures may have weight, too
        others = [
            weight for name, weight in (data.variants[alone].weights or {}).items() if name != self.objectives[index]
        ]
        is_single = bool(self.weights_VM[alone, index] == 1) and not any(others)
        return is_alike and temperatures[0] == temperatures[1] and is_single

    def front_metrics(self, variants: Iterable[int]) -> dict[str, Floats]:
        """Of the variants' normalised points, each [S]: sparsity and spread of their front, and place in that of all.

        Fronts are found anew in each sample. The sparsity of a single point is NaN.
        """
        points_SNM = self.normalised(self.means_SVM[:, list(variants)])
        fronts = [front(points_NM) for points_NM in points_SNM]
        steps = [gaps(front_NM) for front_NM in fronts]
        pairs = list(zip(points_SNM, self._fronts_of_all, strict=True))
        return {
            "sparsity": np.array([np.nan if gaps_M is None else gaps_M.sum() for gaps_M in steps]),
            "spread": np.array([extent(front_NM) for front_NM in fronts]),
            "inverted_generational_distance": np.array([inverted_generational_distance(*pair) for pair in pairs]),
            "pareto_share": np.array([on_front(*pair).mean() for pair in pairs]),
        }

    @cached_property
    def _fronts_of_all(self) -> list[Floats]:
        """The front of all variants' normalised points in each sample."""
        return [front(points_VM) for points_VM in self.normalised(self.means_SVM)]

    def normalised_hypervolumes(self, variants: Iterable[int]) -> Floats:
        """The hypervolume as a share of the box from the reference point to the best mean of each objective, [S].

        NaN where the reference point is not below every best mean, so that there is no box.
        """
        shares_S: Floats = self.hypervolumes(variants) / self.box
        return shares_S

    @property
    def box(self) -> float:
        """The volume from the reference point to the best mean of each objective; NaN where there is none."""
        sides_M = self.high_M - self.reference_M
        return float(np.prod(sides_M)) if (sides_M > 0).all() else np.nan

    def interval(self, samples_S: Floats) -> list[float] | None:
        """The bootstrap interval of a statistic [S] whose first value is the estimate.

        None without samples, and without an estimate: what samples alone have is no interval of it.
        """
        if not np.isfinite(samples_S[0]):
            return None
        # a sample may lack a value: resampled curves need not share a range of KL
        known = samples_S[1:][np.isfinite(samples_S[1:])]
        confidence = widened(self.confidence, len(self.data.row_ids))
        return list(interval(known, confidence)) if len(known) else None


def resample(
    data: Measurements,
    judge_by_objective: Mapping[str, str],
    reference: Mapping[str, float] | None,
    bootstrap: BootstrapConfig,
) -> BootstrapSamples:
    """Resample the prompts and average.

    Args:
        data: scores and numbers by variant and answer.
        judge_by_objective: which judge measures which objective, in order.
        reference: the reference point by objective; None for `metrics.default_reference` of all variants' means.
        bootstrap: number of samples, confidence and seed.
    """
    counts_SA = resample_counts(len(data.row_ids), bootstrap.samples, bootstrap.seed, per_prompt=data.num_samples)
    scores = [data.scores_by_judge[judge] for judge in judge_by_objective.values()]
    means_SVM = np.stack([settled(weighted_means(score_VA, counts_SA)) for score_VA in scores], axis=2)
    points_VM = means_SVM[0]
    weights_VM = np.array(
        [[(variant.weights or {}).get(name, 0.0) for name in judge_by_objective] for variant in data.variants]
    )
    with np.errstate(invalid="ignore"):  # all weights 0 give NaN, which leaves the variant out of weighted means
        weights_VM = settled(weights_VM / weights_VM.sum(1, keepdims=True))
    return BootstrapSamples(
        data=data,
        judges=judge_by_objective,
        means_SVM=means_SVM,
        kl_SV=weighted_means(data.numbers["kl_per_token"], counts_SA),
        counts_SA=counts_SA,
        weights_VM=weights_VM,
        low_M=points_VM.min(0),
        high_M=points_VM.max(0),
        reference_M=default_reference(points_VM)
        if reference is None
        else np.array([reference[name] for name in judge_by_objective]),
        confidence=bootstrap.confidence,
    )
