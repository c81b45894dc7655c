"""Which two methods are compared, which of their variants belong together, and what they differ by.

S bootstrap samples, V variants, A answers, M objectives, I matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from cage.rule_names import RuleName
from pipeline.evaluation.bootstrap import BootstrapSamples
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.metrics import Floats


@dataclass(frozen=True, slots=True)
class Match:
    """Two variants that answer the same question: at equal agent temperature and weights, where rules use them.

    Args:
        ours, theirs: their indices.
        agent_temperature: of both.
        weights_M: of both; those of every vector in turn where neither rule uses weights.
    """

    ours: int
    theirs: int
    agent_temperature: float
    weights_M: Floats


def pairs_of(data: Measurements) -> Iterator[tuple[str, str]]:
    """Every two methods that are compared, once, the equilibrium over tokens first.

    Those over one unit with each other, the same rule over different units, and rules that are for one unit alone
    (`parm`, `best_of_n`) and the base with all others.
    """
    first = str(RuleName.EQUILIBRIUM)
    for method, against in combinations(sorted(data.methods, key=lambda name: name != first), 2):
        ours, theirs = data.variant_of(method), data.variant_of(against)
        is_own = any(not (each.rule.serves_tokens and each.rule.serves_texts) for each in (ours, theirs))
        uses_none = not (ours.rule.uses_principals and theirs.rule.uses_principals)
        if ours.unit is theirs.unit or ours.rule is theirs.rule or is_own or uses_none:
            yield method, against


def common_temperatures(data: Measurements, method: str, against: str) -> list[float]:
    """The agent temperatures at which two methods are compared: those that both have.

    A rule that does not depend on the temperature is compared at every one of the other's.
    """
    ours, theirs = data.temperatures_of(method), data.temperatures_of(against)
    if not data.rule_of(method).uses_temperature:
        return theirs
    if not data.rule_of(against).uses_temperature:
        return ours
    return [each for each in ours if each in theirs]


def matches(samples: BootstrapSamples, method: str, against: str) -> list[Match]:
    """The variants of two methods that belong together."""
    data = samples.data
    found = []
    for ours in data.indices(method):
        for theirs in data.indices(against):
            left, right = data.variants[ours], data.variants[theirs]
            of_temperature = [each for each in (left, right) if each.rule.uses_temperature]
            of_weights = [at for at in (ours, theirs) if data.variants[at].rule.uses_principals]
            if len({each.agent_temperature for each in of_temperature}) > 1:
                continue
            if len(of_weights) == 2 and left.weights != right.weights:
                continue
            temperature = (of_temperature or [left])[0].agent_temperature
            vectors = samples.weights_VM[of_weights[:1]] if of_weights else samples.weight_vectors()
            found += [Match(ours, theirs, temperature, weights_M) for weights_M in vectors]
    return found


def difference_at_equal_length(samples: BootstrapSamples, method: str, against: str) -> Floats | None:
    """How much more w . r a method has than another one would have with answers of equal length, [S].

    A line is fitted through the differences of all matching variants and prompts: of w . r by the difference in
    tokens that judges read, with one slope for all and an intercept for each two variants. The mean of the intercepts
    is the answer, as in length-controlled AlpacaEval (Dubois et al. 2024). None where nothing matches.
    """
    found = [each for each in matches(samples, method, against) if np.isfinite(each.weights_M).all()]
    if not found:
        return None
    data = samples.data
    scores_VAM = np.stack([data.scores_by_judge[judge] for judge in samples.judges.values()], axis=2)
    tokens_VA = data.numbers["answer_tokens"]
    lead_IA = np.stack(
        [samples.normalised_lead(scores_VAM[each.ours] - scores_VAM[each.theirs], each.weights_M) for each in found]
    )
    longer_IA = np.stack([tokens_VA[each.ours] - tokens_VA[each.theirs] for each in found])
    counts_SA = samples.counts_SA
    total_S1 = counts_SA.sum(1, keepdims=True)
    lead_SI, longer_SI = (counts_SA @ each_IA.T / total_S1 for each_IA in (lead_IA, longer_IA))
    # within each two variants: what all prompts have in common is the intercept
    spread_S = (counts_SA @ (longer_IA**2).T / total_S1 - longer_SI**2).sum(1)
    together_S = (counts_SA @ (longer_IA * lead_IA).T / total_S1 - longer_SI * lead_SI).sum(1)
    slope_S = np.where(spread_S > 1e-12, together_S / np.where(spread_S > 1e-12, spread_S, 1.0), 0.0)
    difference_S: Floats = lead_SI.mean(1) - slope_S * longer_SI.mean(1)
    return difference_S
