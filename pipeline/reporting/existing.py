"""New answers beside the existing ones that the input brought: how often, and by how much, they are better.

All numbers are sums over prompts, so one pass in constant memory is enough. N rows, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.reporting.columns import Batch
from pipeline.reporting.text import visible

Floats = np.ndarray[Any, np.dtype[np.float64]]
TIE_NATS = 1e-4  # rewards of the same tokens differ by rounding: they are drawn and scored in different passes
Z = 1.96  # of a 95 % interval
ALL = ""  # stands for all principals; no principal has this name


@dataclass(slots=True)
class Lead:
    """By how much new answers exceed existing ones in one measure.

    Answers to one prompt are not independent: intervals take the prompt as the unit. A prompt whose answers lie in
    two batches counts as two, which is at most one prompt per batch.

    Args:
        wins, ties, losses: answers.
        prompts: how many.
        total: sum of the differences, in nats.
        moments: over prompts, sums of products of its number of answers, its wins and its sum of differences.
    """

    wins: int = 0
    ties: int = 0
    losses: int = 0
    prompts: int = 0
    total: float = 0.0
    moments: Floats = field(default_factory=lambda: np.zeros((3, 3)))

    def add(self, differences_N: Floats, prompt_N: np.ndarray[Any, Any]) -> None:
        """Add answers.

        Args:
            differences_N: reward of the new answer minus that of the existing one; NaN where there is none.
            prompt_N: which prompt each row answers, from 0.
        """
        known_N = np.isfinite(differences_N)
        if not known_N.any():
            return
        wins_N = known_N & (differences_N > TIE_NATS)
        losses_N = known_N & (differences_N < -TIE_NATS)
        columns = (known_N, wins_N, np.where(known_N, differences_N, 0.0))
        sums_3K = np.stack([np.bincount(prompt_N, each.astype(np.float64)) for each in columns])
        sums_3K = sums_3K[:, sums_3K[0] > 0]
        self.prompts += sums_3K.shape[1]
        self.moments += sums_3K @ sums_3K.T
        self.wins += int(wins_N.sum())
        self.losses += int(losses_N.sum())
        self.ties += int(known_N.sum() - wins_N.sum() - losses_N.sum())
        self.total += float(differences_N[known_N].sum())

    @property
    def answers(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def mean(self) -> float:
        """The mean difference, in nats."""
        return self.total / self.answers

    def mean_interval(self) -> tuple[float, float] | None:
        """A 95 % interval of the mean difference; None for a single prompt."""
        if self.prompts < 2:
            return None
        error = math.sqrt(self._variance(2, self.mean) / (1 - 1 / self.prompts))
        return self.mean - Z * error, self.mean + Z * error

    def win_interval(self) -> tuple[float, float]:
        """A 95 % interval of the share of wins: Wilson's, for as many independent answers as its variance allows."""
        share = self.wins / self.answers
        variance = self._variance(1, share)
        count = share * (1 - share) / variance if variance > 0 else float(self.prompts)
        centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
        spread = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
        return max(0.0, centre - spread), min(1.0, centre + spread)

    def _variance(self, at: int, ratio: float) -> float:
        """Of a sum per answer, as a ratio over prompts, to first order: their mean squared residual by K."""
        squares = self.moments[at, at] - 2 * ratio * self.moments[0, at] + ratio**2 * self.moments[0, 0]
        return max(0.0, float(squares)) / self.answers**2


Leads = dict[str, dict[str, Lead]]


def add_leads(leads: Leads, batch: Batch, principal_names: Sequence[str]) -> None:
    """Add a batch to the leads, which are by rule and by principal; `ALL` is the mean of all rewards by weight.

    Equal answers are ties, whatever their rewards' rounding.
    """
    numbers = batch.numbers
    if not principal_names or f"original_rewards.{principal_names[0]}" not in numbers:
        return
    gains_JN = np.stack(
        [numbers[f"rewards.{name}"] - numbers[f"original_rewards.{name}"] for name in principal_names]
    )
    if "has_pair" in numbers:
        gains_JN = np.where(np.isfinite(gains_JN) & (numbers["has_pair"] == 0), 0.0, gains_JN)
    shares_JN = weight_shares(numbers, principal_names)
    measures = dict(zip(principal_names, gains_JN, strict=True)) | {ALL: (shares_JN * gains_JN).sum(0)}
    ids_N = np.array(batch.row_ids, dtype=np.object_)
    prompt_N = np.concatenate([[0], np.cumsum(ids_N[1:] != ids_N[:-1])])
    rules_N = np.array(batch.rules, dtype=np.object_)
    for rule in dict.fromkeys(batch.rules):
        own = leads.setdefault(rule, {})
        for name, gains_N in measures.items():
            own.setdefault(name, Lead()).add(np.where(rules_N == rule, gains_N, np.nan), prompt_N)


def weight_shares(numbers: Mapping[str, Floats], principal_names: Sequence[str]) -> Floats:
    """Each row's weights [J, N] as shares that sum to 1; NaN where all are 0."""
    weights_JN = np.stack([numbers[f"weights.{name}"] for name in principal_names])
    totals_N = weights_JN.sum(0)
    shares_JN: Floats = weights_JN / np.where(totals_N > 0, totals_N, np.nan)
    return shares_JN


def describe_leads(leads: Leads, principal_names: Sequence[str], rules: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of the report's table, by rule and principal, with all principals last."""
    return [
        _line(rule, name, at, leads[rule][name])
        for rule in rules
        for at, name in enumerate([*principal_names, ALL])
        if name in leads.get(rule, {}) and leads[rule][name].answers
    ]


def _line(rule: str, name: str, at: int, lead: Lead) -> dict[str, Any]:
    return {
        "rule": visible(rule),
        "name": name,
        "index": None if name == ALL else at,
        "answers": lead.answers,
        "counts": (lead.wins, lead.ties, lead.losses),
        "shares": tuple(count / lead.answers for count in (lead.wins, lead.ties, lead.losses)),
        "interval": lead.win_interval(),
        "mean": lead.mean,
        "mean_interval": lead.mean_interval(),
    }
