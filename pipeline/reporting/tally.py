"""Sum up a run's numbers in one pass, in memory that does not grow with the run.

Counts, means and extremes are exact. Distributions come from a sample of rows: those with the smallest hashes of
their ids, so that the same run gives the same report however its rows are divided into files. N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cage.rule_names import RuleName
from pipeline.reporting.columns import Batch
from pipeline.reporting.contrast import contrast
from pipeline.reporting.existing import Leads, add_leads, weight_shares

SAMPLED_ROWS = 20_000
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a chosen row is.

    Args:
        score: why it was chosen.
        chance: its hash, which orders equal scores.
        file, index: where it is.
        row_id: the prompt that it answers.
        partner: the index of a row of the same file to show beside it.
    """

    score: float
    chance: int
    file: str = field(compare=False)
    index: int = field(compare=False)
    row_id: str = field(compare=False)
    partner: int | None = field(compare=False, default=None)


@dataclass(slots=True)
class Ranking:
    """The rows with the highest and the lowest scores, one per prompt; those with equal scores by their hashes.

    Args:
        size: how many of each.
        highest, lowest: the rows so far, twice as many, so that no row has to be in both.
    """

    size: int
    highest: list[Place] = field(default_factory=list)
    lowest: list[Place] = field(default_factory=list)

    def add(self, batch: Batch, scores_N: Floats, partners_N: np.ndarray[Any, Any] | None = None) -> None:
        """Add the rows of a batch; rows without a score (NaN) are ignored."""
        scored = np.flatnonzero(np.isfinite(scores_N))
        rising = scored[np.lexsort((batch.hashes[scored], scores_N[scored]))]

        def place(at: int) -> Place:
            partner = None if partners_N is None else batch.start + int(partners_N[at])
            row = batch.start + int(at)
            return Place(float(scores_N[at]), int(batch.hashes[at]), batch.file, row, batch.row_ids[at], partner)

        num_kept = 2 * self.size
        lowest = [place(at) for at in _first_of_prompts(rising, batch.row_ids, num_kept)]
        highest = [place(at) for at in _first_of_prompts(rising[::-1], batch.row_ids, num_kept)]
        self.lowest = _one_per_prompt(sorted([*self.lowest, *lowest]))[:num_kept]
        self.highest = _one_per_prompt(sorted([*self.highest, *highest], reverse=True))[:num_kept]

    def ends(self) -> tuple[list[Place], list[Place]]:
        """The highest and the lowest rows; no row is in both."""
        num_prompts = len(self.highest)  # all of them, or more than are needed
        best = self.highest[: min(self.size, (num_prompts + 1) // 2)]
        taken = {(place.file, place.index) for place in best}
        others = [place for place in self.lowest if (place.file, place.index) not in taken]
        return best, others[: min(self.size, num_prompts - len(best))]


def _first_of_prompts(ordered: np.ndarray[Any, Any], row_ids: Sequence[str], limit: int) -> list[int]:
    """The first row of each prompt, for the first `limit` prompts."""
    found: dict[str, int] = {}
    for at in ordered:
        found.setdefault(row_ids[at], int(at))
        if len(found) == limit:
            break
    return list(found.values())


def _one_per_prompt(places: Iterable[Place]) -> list[Place]:
    found: dict[str, Place] = {}
    for place in places:
        found.setdefault(place.row_id, place)
    return list(found.values())


@dataclass(slots=True)
class Summary:
    """Exact statistics of one rule's rows: counts of finite values, sums, minima and maxima by quantity."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    lows: dict[str, float] = field(default_factory=dict)
    highs: dict[str, float] = field(default_factory=dict)

    def add(self, numbers: dict[str, Floats], chosen_N: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Add the chosen rows of a batch."""
        self.rows += int(chosen_N.sum())
        for name, values_N in numbers.items():
            values = values_N[chosen_N]
            values = values[np.isfinite(values)]
            if values.size:
                self.counts[name] = self.counts.get(name, 0) + int(values.size)
                self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
                self.lows[name] = min(self.lows.get(name, np.inf), float(values.min()))
                self.highs[name] = max(self.highs.get(name, -np.inf), float(values.max()))

    def mean(self, name: str) -> float | None:
        """The mean of a quantity; None where no row has it."""
        count = self.counts.get(name, 0)
        return self.sums[name] / count if count else None


@dataclass(slots=True)
class Sample:
    """A random sample of rows: those with the smallest hashes, whatever the order of the batches.

    Args:
        size: most rows to keep.
        hashes, rules, numbers: of the rows so far.
    """

    size: int
    hashes: np.ndarray[Any, np.dtype[np.uint64]] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    rules: np.ndarray[Any, np.dtype[np.object_]] = field(default_factory=lambda: np.empty(0, dtype=np.object_))
    numbers: dict[str, Floats] = field(default_factory=dict)

    def add(self, batch: Batch, numbers: dict[str, Floats]) -> None:
        """Add the rows of a batch; `numbers` may hold more quantities than the batch itself."""
        is_full = len(self.hashes) >= self.size
        chosen_N = batch.hashes < self.hashes.max() if is_full else np.ones(len(batch), dtype=np.bool_)
        hashes = np.concatenate([self.hashes, batch.hashes[chosen_N]])
        if len(hashes) == len(self.hashes):
            return
        rules = np.concatenate([self.rules, np.array(batch.rules, dtype=np.object_)[chosen_N]])
        keep = np.argsort(hashes, kind="stable")[: self.size]
        names = [*self.numbers, *(name for name in numbers if name not in self.numbers)]
        nothing_before, nothing_now = np.full(len(self.hashes), np.nan), np.full(len(batch), np.nan)
        self.numbers = {
            name: np.concatenate([self.numbers.get(name, nothing_before), numbers.get(name, nothing_now)[chosen_N]])[
                keep
            ]
            for name in names
        }
        self.hashes, self.rules = hashes[keep], rules[keep]

    def values(self, rule: str, name: str) -> Floats:
        """The finite values of one quantity under one rule."""
        values = self.numbers.get(name, np.empty(0))
        chosen: Floats = values[self.rules[: len(values)] == rule]
        return chosen[np.isfinite(chosen)]


@dataclass(slots=True)
class Tally:
    """What one pass over a run's batches collects.

    Args:
        sample: rows for distributions.
        by_rule: exact statistics of each rule.
        leads: new answers against existing ones, by rule and principal.
        by_total: best and worst rows by the mean reward of the principals, by weight.
        by_worst: best and worst rows by the lowest reward of a principal whose weight is not 0.
        by_contrast: rows of the equilibrium that gained and lost most against the weighted sum.
        by_chance: random rows, those with payments first.
    """

    sample: Sample
    by_rule: dict[str, Summary] = field(default_factory=dict)
    leads: Leads = field(default_factory=dict)
    by_total: Ranking = field(default_factory=lambda: Ranking(3))
    by_worst: Ranking = field(default_factory=lambda: Ranking(3))
    by_contrast: Ranking = field(default_factory=lambda: Ranking(3))
    by_chance: Ranking = field(default_factory=lambda: Ranking(6))

    @property
    def rows(self) -> int:
        return sum(summary.rows for summary in self.by_rule.values())

    def add(self, batch: Batch, principal_names: Sequence[str]) -> None:
        """Add the rows of a batch."""
        numbers = dict(batch.numbers)
        if principal_names:
            rewards_JN = np.stack([numbers[f"rewards.{name}"] for name in principal_names])
            shares_JN = weight_shares(numbers, principal_names)
            # as shares, weights say whose reward counts, and twice the weights are not twice the reward
            numbers["weighted_reward"] = (shares_JN * rewards_JN).sum(0)
            worst_N = np.where(shares_JN > 0, rewards_JN, np.inf).min(0)
            numbers["worst_reward"] = np.where(np.isfinite(worst_N), worst_N, np.nan)
            self.by_total.add(batch, numbers["weighted_reward"])
            self.by_worst.add(batch, numbers["worst_reward"])
            add_leads(self.leads, batch, principal_names)
            difference = contrast(batch, numbers["worst_reward"], principal_names)
            self.by_contrast.add(batch, difference.gains, difference.partners)
        rules_N = np.array(batch.rules, dtype=np.object_)
        for rule in dict.fromkeys(batch.rules):
            self.by_rule.setdefault(rule, Summary()).add(numbers, rules_N == rule)
        self.sample.add(batch, numbers)
        self.by_chance.add(batch, _with_payments(batch, principal_names))


def _with_payments(batch: Batch, principal_names: Sequence[str]) -> Floats:
    """A random number in [0, 1) per row, plus one for rows with payments, so that these are taken first."""
    chance_N: Floats = batch.hashes.astype(np.float64) / 2.0**64
    if principal_names:
        chance_N += np.isfinite(batch.numbers[f"payments.{principal_names[0]}"])
    return chance_N


def rule_order(rule: str) -> int:
    """The position of a rule, the same in every report, so that its colour is too; unknown rules come last."""
    known = [str(name) for name in RuleName]
    name = rule.partition(" (")[0]  # before the unit
    return known.index(name) if name in known else len(known)


def tally(batches: Iterable[Batch], principal_names: Sequence[str], *, sampled_rows: int = SAMPLED_ROWS) -> Tally:
    """Sum up all batches.

    Args:
        batches: of the run.
        principal_names: of the run.
        sampled_rows: size of the sample for distributions.
    """
    result = Tally(Sample(sampled_rows))
    for batch in batches:
        if len(batch):
            result.add(batch, principal_names)
    result.by_rule = dict(sorted(result.by_rule.items(), key=lambda item: rule_order(item[0])))
    return result
