"""Rules on recorded games at equal KL: steered by the principals, judged by the views of their objectives.

A rule can only lose against `linear` on the rewards that it sees: at equal mean KL the weighted sum gains most of
them, by the Gibbs variational principle. What counts is what they mean. A second view of the same objective (another
wording, another training) shares the meaning and not the noise, so the gain in the view is the gain without noise.

N games, J principals, P prompts, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import cage
from cage.rule_names import RuleName
from cage.rules import Rule, SoftThreshold
from pipeline.advice.gains import Policies, at_equal_kl, gains, policies
from pipeline.advice.recording import RecordedGames
from pipeline.evaluation.config import BootstrapConfig
from pipeline.evaluation.metrics import Floats, interval, resample_counts
from pipeline.evaluation.significance import widened


@dataclass(frozen=True, slots=True)
class RuleChoice:
    """A rule with its threshold.

    Args:
        rule: its name.
        k: of `soft_threshold`; None for the others.
    """

    rule: RuleName
    k: float | None = None

    def __str__(self) -> str:
        return str(self.rule) if self.k is None else f"{self.rule} {self.k:g}"

    @property
    def function(self) -> Rule:
        """The rule itself."""
        return cage.rules.by_name[self.rule] if self.k is None else SoftThreshold(self.k)


@dataclass(frozen=True, slots=True)
class RuleGain:
    """What a rule gains at a target for KL.

    Args:
        choice: the rule.
        agent_temperature: at which it leaves the base by the target.
        kl: by how much it does, in nats a token: less than the target where no agent temperature reaches that.
        gain: weighted gain in the views, in nats a token.
        gains: the same by principal, before weights.
        share: of the gain of `linear`.
        difference: from the gain of `linear`, and its interval.
        ahead: share of the bootstrap samples in which it gains more than `linear`.
    """

    choice: RuleChoice
    agent_temperature: float
    kl: float
    gain: float
    gains: Mapping[str, float]
    share: float
    difference: float
    difference_interval: tuple[float, float]
    ahead: float

    def reaches(self, target: float) -> bool:
        """Whether some agent temperature takes the rule as far from the base as the target."""
        return self.kl > 0.99 * target


def choices(rules: Sequence[RuleName], k: Sequence[float]) -> list[RuleChoice]:
    """`linear` first, then every other rule once, `soft_threshold` once for each k."""
    found = [RuleChoice(RuleName.LINEAR)]
    for rule in dict.fromkeys(rules):
        found += [RuleChoice(rule, each) for each in k] if rule.takes_k else [RuleChoice(rule)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What rules are compared on.

    Args:
        games: recorded.
        weights: by principal; those with weight 0 take no part.
        views: by principal the name of the rewards that judge it; its own where it has no view.
        bootstrap: of the intervals, over prompts.
    """

    games: RecordedGames
    weights: Mapping[str, float]
    views: Mapping[str, str]
    bootstrap: BootstrapConfig

    @property
    def names(self) -> list[str]:
        """The principals that take part."""
        return [name for name, weight in self.weights.items() if weight > 0]

    @property
    def num_prompts(self) -> int:
        """How many prompts have games."""
        return len(set(self.games.row_N.tolist()))

    def kl_of(self, rule: Rule, temperature: float) -> float:
        """The mean KL to the base that a rule reaches at an agent temperature, in nats a token."""
        return policies(rule, self.games.base_NK, self._values, temperature, self._weights).kl

    def compare(self, rules: Sequence[RuleChoice], target: float) -> list[RuleGain]:
        """Every rule at a mean KL of `target` nats a token; `linear` must be among them."""
        judged_NJK = self.games.rewards_of([self.views.get(name, name) for name in self.names])
        found, by_principal = {}, {}
        for choice in rules:
            found[choice] = at_equal_kl(choice.function, self.games.base_NK, self._values, target, self._weights)
            by_principal[choice] = gains(found[choice], self.games.base_NK, judged_NJK)
        weighted = {choice: self._resampled(gain_NJ @ self._weights) for choice, gain_NJ in by_principal.items()}
        sum_S = weighted[RuleChoice(RuleName.LINEAR)]
        return [self._gain(found[each], each, by_principal[each], weighted[each], sum_S) for each in rules]

    def _gain(self, found: Policies, choice: RuleChoice, gain_NJ: Tensor, gain_S: Floats, sum_S: Floats) -> RuleGain:
        difference_S = gain_S - sum_S
        return RuleGain(
            choice=choice,
            agent_temperature=found.agent_temperature,
            kl=found.kl,
            gain=float(gain_S[0]),
            gains=dict(zip(self.names, gain_NJ.mean(0).tolist(), strict=True)),
            share=float(gain_S[0] / sum_S[0]) if sum_S[0] else float("nan"),
            difference=float(difference_S[0]),
            difference_interval=interval(difference_S[1:], widened(self.bootstrap.confidence, self.num_prompts)),
            ahead=float((difference_S[1:] > 0).mean()),
        )

    def _resampled(self, gain_N: Tensor) -> Floats:
        """The mean gain a token, over all games and in every bootstrap sample of prompts, [1 + S]."""
        _, row_N = np.unique(self.games.row_N.numpy(), return_inverse=True)  # a sample may lack games of some rows
        tokens_P = np.bincount(row_N).astype(np.float64)
        total_P = np.bincount(row_N, gain_N.numpy())
        counts_SP = resample_counts(len(tokens_P), self.bootstrap.samples, self.bootstrap.seed)
        means_S: Floats = (counts_SP @ total_P) / (counts_SP @ tokens_P)
        return means_S

    @property
    def _weights(self) -> Tensor:
        return torch.tensor([self.weights[name] for name in self.names], dtype=torch.float64)

    @property
    def _values(self) -> Tensor:
        return self.games.rewards_of(self.names) * self._weights[:, None]
