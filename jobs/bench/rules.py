"""`cage bench rules`: what rules gain at equal KL when token rewards are a true signal and noise.

Synthetic games: the principals' values are what the rules see, the true signal is what the answer is judged by. Every
rule's agent temperature is found by bisection, so that all leave the base equally far on average.

Shapes: B games, J principals, V tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cage
from cage.rules import Rule, SoftThreshold
from pipeline.sampling.games import kl_to_base

NUM_TOKENS, SIGNAL, PEAKED = 50, 4.0, 3.0
SHARES = ((1.0, 1.0), (1.0, 0.15), (0.1, 1.0), (0.1, 0.15))  # of tokens, of steps with a signal
NOISES = (0.3, 1.0, 2.0)
TARGETS = (0.1, 0.4)
RULES: Mapping[str, Rule] = {
    "linear": cage.rules.linear,
    "equilibrium": cage.rules.equilibrium,
    "solo": cage.rules.solo,
    "soft 0": SoftThreshold(0.0),
    "soft 1": SoftThreshold(1.0),
    "soft 2": SoftThreshold(2.0),
    "maximin": cage.rules.maximin,
}
NUM_HALVINGS = 24  # of a factor of e^12 in the agent temperature


@dataclass(frozen=True, slots=True)
class Gain:
    """What a rule gains in games of one kind.

    Attributes:
        tokens, steps: share of tokens, and of games, with a signal.
        noise: standard deviation of the noise in the values.
        target: mean KL to the base that every rule was brought to, in nats.
        rule: its name.
        gain: mean true weighted value that it gains over the base.
        ratio: that gain as a share of the weighted sum's.
        kl: what it was brought to.
    """

    tokens: float
    steps: float
    noise: float
    target: float
    rule: str
    gain: float
    ratio: float
    kl: float


def run_bench_rules(*, games: int, principals: int, json_file: Path | None) -> None:
    """Measure every rule in every kind of game, print a table, and write the measurements to `json_file`."""
    torch.set_num_threads(1)
    gains = measure(games=games, num_principals=principals)
    print_gains(gains)
    if json_file is not None:
        measured = {"games": games, "principals": principals, "gains": [asdict(gain) for gain in gains]}
        json_file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def measure(*, games: int, num_principals: int) -> list[Gain]:
    """The gains of all rules in all kinds of games."""
    gains = []
    for tokens, steps in SHARES:
        for noise in NOISES:
            base_BV, true_BJV, seen_BJV = make_games(games, num_principals, tokens=tokens, steps=steps, noise=noise)
            for target in TARGETS:
                found = {name: gain_at(rule, base_BV, true_BJV, seen_BJV, target) for name, rule in RULES.items()}
                of_sum = found["linear"][0]
                gains += [
                    Gain(tokens, steps, noise, target, name, gain, gain / of_sum, kl)
                    for name, (gain, kl) in found.items()
                ]
    return gains


def make_games(
    num_games: int, num_principals: int, *, tokens: float, steps: float, noise: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Base log-probabilities [B, V], the true values [B, J, V], and what the rules see: those with noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_games, num_principals, NUM_TOKENS)

    def normal(*of: int) -> Tensor:
        return torch.randn(of, generator=generator, dtype=torch.float64)

    def is_within(share: float, *of: int) -> Tensor:
        return torch.rand(of, generator=generator, dtype=torch.float64) < share

    base_BV = (PEAKED * normal(num_games, NUM_TOKENS)).log_softmax(-1)
    has_signal_BJV = is_within(tokens, *shape) & is_within(steps, num_games, 1, 1)
    true_BJV = torch.where(has_signal_BJV, SIGNAL * normal(*shape), 0.0) / num_principals
    return base_BV, true_BJV, true_BJV + noise * normal(*shape) / num_principals


def gain_at(rule: Rule, base_BV: Tensor, true_BJV: Tensor, seen_BJV: Tensor, target: float) -> tuple[float, float]:
    """The mean true value that a rule gains over the base, and its mean KL, at the temperature that meets a target.

    Args:
        target: mean KL in nats; a higher agent temperature leaves the base less far.
    """
    low, high = -6.0, 6.0  # logarithms of agent temperatures
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        policy_BV, kl = _policy(rule, base_BV, seen_BJV, math.exp(middle))
        low, high = (middle, high) if kl > target else (low, middle)
    worth_BV = true_BJV.sum(1)
    gain = ((policy_BV - base_BV.exp()) * worth_BV).sum(-1).mean()
    return float(gain), kl


def _policy(rule: Rule, base_BV: Tensor, seen_BJV: Tensor, temperature: float) -> tuple[Tensor, float]:
    log_policy_BV = rule(cage.Game(base_BV, seen_BJV, temperature)).log_policy
    return log_policy_BV.exp(), float(kl_to_base(log_policy_BV, base_BV).mean())


def print_gains(gains: list[Gain]) -> None:
    """A row for each kind of game and target, a column for each rule."""
    table = Table(
        title="True value gained at equal KL, as a share of the weighted sum's (tokens, steps: that have a signal)",
        padding=(0, 0),
    )
    for column in ("tokens, steps", "noise", "KL", *(name for name in RULES if name != "linear")):
        table.add_column(column, justify="right", no_wrap=True)
    cells: dict[tuple[float, ...], dict[str, float]] = {}
    for gain in gains:
        cells.setdefault((gain.tokens, gain.steps, gain.noise, gain.target), {})[gain.rule] = gain.ratio
    for (tokens, steps, noise, target), ratios in cells.items():
        shown = [f"{ratio:.2f}" for name, ratio in ratios.items() if name != "linear"]
        table.add_row(f"{tokens:.0%}, {steps:.0%}", f"{noise:g}", f"{target:g}", *shown)
    Console().print(table)
