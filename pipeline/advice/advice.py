"""From measurements to a suggestion: which rule, at which agent temperature, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cage.rule_names import RuleName
from cage.rules import SoftThreshold
from pipeline.advice.comparison import Comparison, RuleChoice, RuleGain, choices
from pipeline.advice.measures import RewardMeasures, correlation, measure_rewards, with_equal_sizes
from pipeline.advice.recording import RecordedGames
from pipeline.advice.settings import COMPARABLE, VIEW, AdviseConfig
from pipeline.errors import ConfigurationError

LEAST_KL = 1e-6  # nats per token; less is rounding


@dataclass(frozen=True, slots=True)
class Advice:
    """What recorded games say about a run's rules.

    Args:
        num_prompts, num_tokens: what was recorded.
        measures: by principal.
        correlations: of the rewards of every two principals.
        unseen: principals without a view, whose rewards are taken as they are.
        target_kl: nats a token at which rules are compared.
        rules: what each gains; `linear` first.
        suggested: one of them.
        is_ahead: whether its gain is above that of `linear` beyond what chance explains; false for `linear` itself.
        confidence: share of the bootstrap samples in which it gains most: of it and `linear`, or, where `linear` is
            suggested, of `linear` and the best of the others.
    """

    num_prompts: int
    num_tokens: int
    measures: Mapping[str, RewardMeasures]
    correlations: Mapping[tuple[str, str], float]
    unseen: tuple[str, ...]
    target_kl: float
    rules: tuple[RuleGain, ...]
    suggested: RuleGain
    is_ahead: bool
    confidence: float


def advise(config: AdviseConfig, games: RecordedGames) -> Advice:
    """Measure the principals, compare the rules and suggest one.

    A rule other than `linear` is suggested where the interval of its lead does not hold 0, widened for the number of
    rules that are compared (Bonferroni). Otherwise it is `linear`: the simplest of those that gain as much.

    Args:
        config: the job; its principals and views are those of the games.
        games: recorded.

    Raises:
        ConfigurationError: there are games of one prompt alone, the configured rule does not leave the base, or
            `linear` does not reach the target.
    """
    if len(games.row_ids) < 2:  # resampling one prompt says nothing about others
        raise ConfigurationError(f"rules are compared over 2 prompts or more; got games of {len(games.row_ids)}")
    settings = config.advise
    views = {name: name + VIEW for name in settings.views}
    rules = choices(settings.rules, settings.k)
    strict = settings.bootstrap.model_copy(
        update={"confidence": 1 - (1 - settings.bootstrap.confidence) / max(1, len(rules) - 1)}
    )
    comparison = Comparison(with_equal_sizes(games, views), config.weights, views, strict)
    target = settings.target_kl or config.decoding.target_kl or _configured_kl(config, comparison)
    found = comparison.compare(rules, target)
    if not found[0].reaches(target):
        raise ConfigurationError(
            f"linear goes no further from the base than {found[0].kl:.3g} nats per token on these games, so rules "
            f"cannot be compared at {target:.3g}; give a smaller advise.target_kl"
        )
    suggested, is_ahead, confidence = _suggest(found)
    names = comparison.names
    return Advice(
        num_prompts=len(games.row_ids),
        num_tokens=games.num_games,
        measures={
            name: measure_rewards(
                games.base_NK, games.rewards[name], games.rewards[views[name]] if name in views else None
            )
            for name in names
        },
        correlations={
            (one, other): correlation(games.base_NK, games.rewards[one], games.rewards[other])
            for at, one in enumerate(names)
            for other in names[at + 1 :]
        },
        unseen=tuple(name for name in names if name not in views),
        target_kl=target,
        rules=tuple(found),
        suggested=suggested,
        is_ahead=is_ahead,
        confidence=confidence,
    )


def _configured_kl(config: AdviseConfig, comparison: Comparison) -> float:
    """What the configured rule reaches at the configured agent temperature, in nats a token."""
    decoding = config.decoding
    rule = decoding.rule if decoding.rule in COMPARABLE else RuleName.LINEAR
    function = RuleChoice(rule).function
    if rule.takes_k:
        given = decoding.soft_threshold
        k = torch.tensor([given[name] for name in comparison.names]) if isinstance(given, dict) else given
        function = SoftThreshold(k)
    kl = comparison.kl_of(function, decoding.agent_temperature)
    if kl < LEAST_KL:
        raise ConfigurationError(
            f"{rule} at decoding.agent_temperature {decoding.agent_temperature:g} does not leave the base on these "
            "games, so there is no distance to compare rules at; give advise.target_kl"
        )
    return kl


def _suggest(rules: Sequence[RuleGain]) -> tuple[RuleGain, bool, float]:
    linear, *others = rules
    ahead = [each for each in others if each.difference_interval[0] > 0]
    if ahead:
        best = max(ahead, key=lambda each: each.gain)
        return best, True, best.ahead
    best_other = max(others, key=lambda each: each.gain, default=None)
    return linear, False, 1.0 if best_other is None else 1.0 - best_other.ahead
