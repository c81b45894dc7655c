"""What-if questions on recorded games: other scales, noise, misreports, more principals, several equilibria.

No model is needed: the token rewards of the evidence's principals were recorded once, on the base's own answers, and
every rule is solved on them. Rules are steered by one view of an objective and judged by the other.

N games, J principals, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

import cage
from cage.rule_names import RuleName
from pipeline.advice.comparison import Comparison, choices
from pipeline.advice.gains import at_equal_kl, gains, policies
from pipeline.advice.measures import measure_rewards, with_equal_sizes
from pipeline.advice.recording import RecordedGames
from pipeline.advice.settings import VIEW
from pipeline.evaluation.config import BootstrapConfig

Json = dict[str, Any]
# of the others maximin takes a hundred times as long, and the evaluations have it
RULES = choices(
    [RuleName.EQUILIBRIUM, RuleName.SOLO, RuleName.SOFT_THRESHOLD, RuleName.MIXTURE],
    (0.0, 1.0, 2.0),
)
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
NOISES = (0.0, 0.25, 0.5, 1.0, 2.0)
LIES = (1.0, 2.0, 5.0, 10.0)
MOST_SWEEPS = 100  # of Jacobi
SAME = 1e-4  # total variation below which two policies are one equilibrium


def sample(games: RecordedGames, most: int, seed: int = 0) -> RecordedGames:
    """Some of the games, drawn at random; all where there are no more."""
    if games.num_games <= most:
        return games
    at_N = torch.randperm(games.num_games, generator=torch.Generator().manual_seed(seed))[:most].sort().values
    rewards = {name: reward_NK[at_N] for name, reward_NK in games.rewards.items()}
    return RecordedGames(games.base_NK[at_N], rewards, games.row_N[at_N], games.row_ids)


def with_views_as_large(games: RecordedGames) -> RecordedGames:
    """The games with every view as large as the other one of its objective."""
    return with_equal_sizes(games, {name: view_of(name) for name in games.rewards if not name.endswith(VIEW)})


def view_of(name: str) -> str:
    """The other view of the same objective."""
    return name.removesuffix(VIEW) if name.endswith(VIEW) else name + VIEW


def comparison_of(games: RecordedGames, weights: Mapping[str, float]) -> Comparison:
    """Rules steered by these principals and judged by the other view of each."""
    return Comparison(games, weights, {name: view_of(name) for name in weights}, BootstrapConfig())


def equal_kl(games: RecordedGames, pairs: Sequence[tuple[str, str]], targets: Sequence[float]) -> Iterator[Json]:
    """Every rule on every pair of principals, at three weight vectors and a few distances from the base."""
    for one, other in pairs:
        for weight in (0.2, 0.5, 0.8):
            comparison = comparison_of(games, {one: weight, other: 1 - weight})
            for target in targets:
                for found in comparison.compare(RULES, target):
                    yield {
                        "pair": [one, other],
                        "weight": weight,
                        "target_kl": target,
                        "rule": str(found.choice),
                        "agent_temperature": found.agent_temperature,
                        "kl": found.kl,
                        "gain": found.gain,
                        "share": found.share,
                        "lead": found.difference,
                        "lead_interval": list(found.difference_interval),
                        "gains": dict(found.gains),
                    }


def rewards(games: RecordedGames) -> Iterator[Json]:
    """How large, sparse and noisy every principal's token rewards are."""
    for name in games.rewards:
        if not name.endswith(VIEW):
            found = measure_rewards(games.base_NK, games.rewards[name], games.rewards[view_of(name)])
            yield {"principal": name, **{key: getattr(found, key) for key in found.__dataclass_fields__}}


def scaled(games: RecordedGames, pairs: Sequence[tuple[str, str]], target: float) -> Iterator[Json]:
    """One of two principals speaks `scale` times as loud as it should: what is left for the other, at equal KL."""
    for one, other in pairs:
        for scale in SCALES:
            loud = replace(games, rewards={**games.rewards, one: games.rewards[one] * scale})
            for found in comparison_of(loud, {one: 0.5, other: 0.5}).compare(RULES, target):
                yield {
                    "pair": [one, other],
                    "scale": scale,
                    "rule": str(found.choice),
                    "kl": found.kl,
                    "gain": found.gain,
                    "share": found.share,
                    "loud": found.gains[one],
                    "other": found.gains[other],
                }


def noisy(games: RecordedGames, pairs: Sequence[tuple[str, str]], target: float) -> Iterator[Json]:
    """White noise in what the rules see, independent for every token and principal; judged without it."""
    for one, other in pairs:
        for noise in NOISES:
            generator = torch.Generator().manual_seed(0)
            seen = dict(games.rewards)
            for name in (one, other):
                shape = seen[name].shape
                seen[name] = seen[name] + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
            for found in comparison_of(replace(games, rewards=seen), {one: 0.5, other: 0.5}).compare(RULES, target):
                yield {
                    "pair": [one, other],
                    "noise": noise,
                    "rule": str(found.choice),
                    "kl": found.kl,
                    "gain": found.gain,
                    "share": found.share,
                    "lead": found.difference,
                    "lead_interval": list(found.difference_interval),
                }


def lying(games: RecordedGames, pairs: Sequence[tuple[str, str]], target: float) -> Iterator[Json]:
    """One principal reports `lie` times its rewards, and the agent temperature stays as it was for the truth."""
    for one, other in pairs:
        names = [one, other]
        weights_J = torch.tensor([0.5, 0.5], dtype=torch.float64)
        true_NJK = games.rewards_of(names)
        judged_NJK = games.rewards_of([view_of(name) for name in names])
        for rule in RULES:
            honest = at_equal_kl(rule.function, games.base_NK, true_NJK * weights_J[:, None], target, weights_J)
            for lie in LIES:
                said_NJK = true_NJK * (weights_J * torch.tensor([lie, 1.0], dtype=torch.float64))[:, None]
                found = policies(rule.function, games.base_NK, said_NJK, honest.agent_temperature, weights_J)
                liar, victim = gains(found, games.base_NK, judged_NJK).mean(0).tolist()
                yield {
                    "pair": names,
                    "lie": lie,
                    "rule": str(rule),
                    "kl": found.kl,
                    "liar": liar,
                    "victim": victim,
                }


def many(games: RecordedGames, groups: Sequence[Sequence[str]], target: float) -> Iterator[Json]:
    """Three, four and eight principals with equal weights: the sum of their gains, and the smallest one."""
    for group in groups:
        comparison = comparison_of(games, {name: 1 / len(group) for name in group})
        for found in comparison.compare(RULES, target):
            yield {
                "principals": len(group),
                "group": list(group),
                "rule": str(found.choice),
                "kl": found.kl,
                "gain": found.gain,
                "share": found.share,
                "worst": min(found.gains.values()),
                "num_losing": sum(gain < 0 for gain in found.gains.values()),
            }


def equilibria(
    games: RecordedGames, groups: Sequence[Sequence[str]], temperatures: Sequence[float], starts: int
) -> Iterator[Json]:
    """How often Jacobi ends at other policies when it starts elsewhere, of the games where principals pay."""
    for group in groups:
        values_NJK = games.rewards_of(group) / len(group)
        for temperature in temperatures:
            game = cage.Game(games.base_NK, values_NJK, temperature)
            reference = cage.solve(game)
            pays_N = (reference.log_policy - games.base_NK).abs().amax(-1) > 1e-9
            farthest_N = torch.zeros_like(games.base_NK[:, 0])
            num_settled = 0
            for seed in range(starts):
                solution = cage.Jacobi(start_seed=seed, max_steps=MOST_SWEEPS).solve(game)
                settled_N = solution.status == cage.Status.CONVERGED
                distance_N = 0.5 * (solution.policy - reference.policy).abs().sum(-1)
                farthest_N = torch.maximum(farthest_N, torch.where(settled_N, distance_N, 0.0))
                num_settled += int(settled_N.sum())
            yield {
                "principals": len(group),
                "group": list(group),
                "agent_temperature": temperature,
                "games": games.num_games,
                "games_with_payments": int(pays_N.sum()),
                "starts": starts,
                "settled_share": num_settled / (starts * games.num_games),
                "games_with_several": int((farthest_N > SAME).sum()),
                "largest_distance": float(farthest_N.max()),
            }


def first(names: Sequence[str], count: int) -> list[str]:
    """The first names, and then the other views of them, where there are not enough."""
    return list(islice([*names, *map(view_of, names)], count))
