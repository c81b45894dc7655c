"""Rules: ways to turn a base policy and the principals' values into one policy, behind one signature.

Every rule takes the same game, so a decoder can switch between them, row by row.

To add a rule, change two files:

1. here, write a function (or a frozen dataclass with options and `__call__`) that satisfies `Rule`, and enter it in
   `by_name`. Work on rows independently, never raise for the numbers in a game, and report each row's `Status`;
2. in `cage/rule_names.py`, add a member to `RuleName` with its facts.

The configuration, the grid, the decoder and the reports take it from there. A test compares the two files.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from cage.direct import in_batches
from cage.game import Game
from cage.maximin import find_shares, tilted
from cage.newton import ThresholdNewton
from cage.normalization import LOWEST_VALUE, Measures, excess, log_base, measure, scale
from cage.rule_names import RuleName
from cage.solution import Solution, SolutionBuilder, Status

_ALL = slice(None)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """A policy per row, and how it was found.

    log_policy: the policy in logarithms, [B, V]; NaN for rows that are not finite.
    thresholds: as in `Solution`, [B, J]; None for rules under which nobody pays.
    residual: distance from the rule's exact answer, [B]; 0 for rules in closed form.
    status: `Status` values, [B].
    num_steps: evaluations of each row's game, [B].
    """

    log_policy: Tensor
    thresholds: Tensor | None
    residual: Tensor
    status: Tensor
    num_steps: Tensor


class Rule(Protocol):
    """Decide one policy per row.

    game: base policies, values and agent temperatures.
    weights: preference weights [B, J], which the values already contain; only the rules that mix policies need them.
    """

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision: ...


class Method(Protocol):
    """A method that finds equilibria: `ThresholdNewton`, `FixedStepNewton`, `Jacobi` or `GaussSeidel`."""

    def solve(self, game: Game) -> Solution: ...


def base(game: Game, weights: Tensor | None = None) -> Decision:
    """Keep the base policy as it is."""
    finite_B = torch.isfinite(torch.logsumexp(game.base_logprobs, -1))
    return _closed_form(game.base_logprobs, finite_B)


def linear(game: Game, weights: Tensor | None = None) -> Decision:
    """Tilt the base by the sum of all values: softmax(log pi0 + sum_j v_j / tau)."""
    measures = measure(game)
    logits_BV = log_base(game, measures, _ALL)
    for tilt_BV in _tilts(game, measures):
        logits_BV = logits_BV.add_(tilt_BV)
    return _closed_form(logits_BV, measures.finite)


def best_of_n(game: Game, weights: Tensor | None = None) -> Decision:
    """Take the candidate with the highest sum of values, among those that the base can draw.

    Equal ones share the policy as the base has it. This is `linear` in the limit of an agent temperature of 0.
    """
    measures = measure(game)
    base_BV = log_base(game, measures, _ALL)
    total_BV = game.values.sum(1).masked_fill(base_BV == -torch.inf, -torch.inf)
    is_best_BV = total_BV == total_BV.amax(-1, keepdim=True)
    return _closed_form(base_BV.masked_fill(~is_best_BV, -torch.inf), measures.finite)


def mixture(game: Game, weights: Tensor | None = None) -> Decision:
    """Mix each principal's own tilted policy: sum_j w_j softmax(log pi0 + q_j / tau), with q_j = v_j / w_j.

    weights: preference weights [B, J], normalised to sum to 1. A principal with weight 0 takes no part; if all
        weights of a row are 0, it keeps its base policy.

    Raises ValueError for weights that are missing, negative, not finite or of another shape.
    """
    mixed = _Tuned.of(game, weights)
    mix_BV = torch.full_like(mixed.base_BV, -torch.inf)
    for log_ratio_BV, log_weight_B1 in mixed.log_ratios():
        mix_BV = _log_add(mix_BV, log_ratio_BV + log_weight_B1)
    return mixed.decision(mix_BV)


def forward_kl(game: Game, weights: Tensor | None = None) -> Decision:
    """Mix the tilted policies of `mixture` by their weighted harmonic mean: 1 / pi ~ sum_j w_j / pi_j.

    This is MOD for the forward KL divergence (arXiv 2406.18853), as its authors decode with it: f'(x) = -1/x, and the
    result is normalised. A token counts only if every principal finds it likely. Weights and errors as in `mixture`.
    """
    mixed = _Tuned.of(game, weights)
    inverse_BV = torch.full_like(mixed.base_BV, -torch.inf)
    for log_ratio_BV, log_weight_B1 in mixed.log_ratios():
        inverse_BV = _log_add(inverse_BV, log_weight_B1 - log_ratio_BV)
    return mixed.decision(-inverse_BV)


def jensen_shannon(game: Game, weights: Tensor | None = None) -> Decision:
    """Mix the tilted policies of `mixture` by x / (1 + x) = prod_j (x_j / (1 + x_j))^w_j, where x = pi / pi0.

    This is MOD for the Jensen-Shannon divergence (arXiv 2406.18853): f'(x) = log(2x / (1 + x)), and the result is
    normalised. Weights and errors as in `mixture`.
    """
    mixed = _Tuned.of(game, weights)
    # loss = -log(x / (1 + x)), in logarithms: it is as small as exp(-200) where a base probability is
    log_loss_BV = torch.full_like(mixed.base_BV, -torch.inf)
    for log_ratio_BV, log_weight_B1 in mixed.log_ratios():
        softplus_BV = (-log_ratio_BV).clamp_min(0.0) + torch.log1p(torch.exp(-log_ratio_BV.abs()))
        log_ratio_loss_BV = torch.where(log_ratio_BV > 15.0, -log_ratio_BV, softplus_BV.log())
        log_loss_BV = _log_add(log_loss_BV, log_ratio_loss_BV + log_weight_B1)
    loss_BV = log_loss_BV.exp()
    return mixed.decision(-loss_BV - torch.where(log_loss_BV < -15.0, log_loss_BV, (-torch.expm1(-loss_BV)).log()))


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b), elementwise.

    torch.logaddexp and softplus take another way for the last numbers of a tensor than for those before: their bits
    depend on where a row stands in a batch. exp and log1p do not.
    """
    gap = (a - b).abs().nan_to_num_(nan=0.0)  # of two infinities
    return torch.maximum(a, b) + torch.log1p(torch.exp(-gap))


@dataclass(frozen=True, slots=True, eq=False)
class _Tuned:
    """The policy of each principal alone, pi_j = softmax(log pi0 + q_j / tau), as rules that mix them need it.

    base_BV: log pi0. weights_BJ: the weights as given; `log_ratios` makes them sum to 1.
    """

    game: Game
    measures: Measures
    base_BV: Tensor
    weights_BJ: Tensor

    @classmethod
    def of(cls, game: Game, weights: Tensor | None) -> _Tuned:
        """Check the weights, which `mixture` describes."""
        measures = measure(game)
        return cls(game, measures, log_base(game, measures, _ALL), _checked_weights(game, weights))

    def log_ratios(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield log pi_j - log pi0 [B, V] and the logarithm of the weight [B, 1], one principal after another."""
        total_B1 = self.weights_BJ.sum(1, keepdim=True)
        for tilt_BV, weight_B in zip(_tilts(self.game, self.measures), self.weights_BJ.unbind(1), strict=True):
            weight_B1 = weight_B[:, None]
            # of a principal with weight 0 (0 / 0) only log(0) = -inf counts, so the NaN may become any number
            tilt_BV = (tilt_BV / weight_B1).clamp_min_(LOWEST_VALUE).nan_to_num_(0.0)
            log_partition_B1 = torch.logsumexp(self.base_BV + tilt_BV, -1, keepdim=True)
            yield tilt_BV - log_partition_B1, (weight_B1 / total_B1).log()

    def decision(self, log_ratio_BV: Tensor) -> Decision:
        """Return the policy pi0 times the ratio, normalised; where all weights are 0, the base policy."""
        nobody_B1 = (self.weights_BJ == 0.0).all(1, keepdim=True)
        logits_BV = torch.where(nobody_B1, self.base_BV, self.base_BV + log_ratio_BV)
        return _closed_form(logits_BV, self.measures.finite)


@dataclass(frozen=True, slots=True)
class Maximin:
    """Tilt to the worst-off principal: softmax(log pi0 + sum_j l_j v_j / tau), l minimising the log-partition.

    By duality this policy maximises min_j E_pi[v_j] - tau KL(pi || pi0). Unlike an equilibrium it depends on
    constants added to the values (docs/mathematics.md, section 9).

    tol: largest gap to optimality, in agent temperatures, that counts as converged.
    max_steps: most evaluations of one row. A row that needs more has status MAX_STEPS and its latest answer.
    """

    tol: float = 1e-9
    max_steps: int = 500

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision:
        decisions = [self._decide(batch) for _, batch in in_batches(game)]
        names = ("log_policy", "residual", "status", "num_steps")
        parts = [torch.cat([getattr(decision, name) for decision in decisions]) for name in names]
        log_policy_BV, residual_B, status_B, num_steps_B = parts
        return Decision(log_policy_BV.to(game.values), None, residual_B.to(game.values), status_B, num_steps_B)

    def _decide(self, game: Game) -> Decision:
        measures = measure(game)
        scaled = scale(game, measures)
        offset_BJ = measures.best / measures.temperature[:, None]
        shares_BJ, gap_B, steps_B = find_shares(scaled, offset_BJ, tol=self.tol, max_steps=self.max_steps)
        decision = _closed_form(tilted(scaled, shares_BJ), measures.finite)
        late_B = measures.finite & ~(gap_B <= self.tol)
        status_B = torch.where(late_B, int(Status.MAX_STEPS), decision.status)
        return replace(decision, residual=decision.residual + gap_B, status=status_B, num_steps=steps_B)


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """Let the principals pay for tokens: the equilibrium of the common-agency game.

    method: how to find it.
    """

    method: Method = field(default_factory=ThresholdNewton)

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision:
        solution = self.method.solve(game)
        return Decision(
            solution.log_policy, solution.thresholds, solution.residual, solution.status, solution.num_steps
        )


@dataclass(frozen=True, slots=True, eq=False)
class SoftThreshold:
    """Tilt by the part of each value above a fixed threshold: c_j = E_pi0[v_j] + k_j tau, and no game is solved.

    This is soft-thresholding as it is used to denoise sparse signals. At k = 1 the thresholds are those at which
    nobody pays in the game; for k far below 0 every token is paid for, and the rule becomes `linear`.

    k: agent temperatures; a number, or a tensor that broadcasts to [B, J].
    """

    k: float | Tensor = 1.0

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision:
        measures = measure(game)
        k_BJ = torch.as_tensor(self.k, dtype=measures.mean.dtype, device=measures.mean.device)
        return _at_thresholds(game, measures, measures.no_offer_thresholds - 1.0 + k_BJ)


@dataclass(frozen=True, slots=True)
class Solo:
    """Let each principal pay what it would pay if it were the only one, and sum the payments.

    method: how to find each principal's own equilibrium.
    """

    method: Method = field(default_factory=ThresholdNewton)

    def __call__(self, game: Game, weights: Tensor | None = None) -> Decision:
        measures = measure(game)
        num_rows, num_principals, num_tokens = game.values.shape
        if num_principals == 0:
            return replace(base(game), thresholds=measures.best)
        alone = Game(
            game.base_logprobs.repeat_interleave(num_principals, 0),
            game.values.reshape(num_rows * num_principals, 1, num_tokens),
            game.row_temperatures.repeat_interleave(num_principals),
        )
        solution = self.method.solve(alone)
        thresholds_BJ = solution.thresholds.view(num_rows, num_principals)
        scaled_BJ = (thresholds_BJ - measures.best) / measures.temperature[:, None]
        decision = _at_thresholds(game, measures, scaled_BJ.nan_to_num(nan=1.0))
        residual_B, status_B, num_steps_B = (
            each.view(num_rows, num_principals) for each in (solution.residual, solution.status, solution.num_steps)
        )
        return replace(
            decision,
            residual=decision.residual + residual_B.amax(1),
            status=torch.maximum(decision.status, status_B.amax(1).to(decision.status)),
            num_steps=num_steps_B.sum(1).to(torch.int32),
        )


def _at_thresholds(game: Game, measures: Measures, scaled_BJ: Tensor) -> Decision:
    """Return the decision when each principal pays what exceeds its scaled threshold [B, J]."""
    builder = SolutionBuilder(game, measures)
    builder.set_thresholds(scaled_BJ)
    return replace(_closed_form(builder.log_policy, measures.finite), thresholds=measures.thresholds(scaled_BJ))


def _tilts(game: Game, measures: Measures) -> Iterator[Tensor]:
    """Yield (v_j - max v_j) / tau [B, V] of one principal after another; the constant drops out of a softmax."""
    at_best_B1 = torch.zeros_like(measures.temperature)[:, None]
    for j in range(game.num_principals):
        tilt_B1V = excess(game, measures, _ALL, at_best_B1, slice(j, j + 1))
        yield tilt_B1V[:, 0].div_(measures.temperature[:, None])


def _checked_weights(game: Game, weights: Tensor | None) -> Tensor:
    shape = tuple(game.values.shape[:2])
    given = None if weights is None else tuple(weights.shape)
    if weights is None or given != shape:
        raise ValueError(f"a rule that mixes policies needs weights {shape}; got {given}")
    bad = ~(torch.isfinite(weights) & (weights >= 0.0))
    if bool(bad.any()):
        raise ValueError(f"weights must be finite and not negative; got {weights[bad][0].item()}")
    return weights.to(game.values)


def _closed_form(logits_BV: Tensor, finite_B: Tensor) -> Decision:
    """Return the decision of a rule without iterations: logits normalised; rows that are not finite hold NaN."""
    blank_B = torch.where(finite_B, 0.0, torch.nan).to(logits_BV)
    return Decision(
        log_policy=torch.log_softmax(logits_BV, -1) + blank_B[:, None],
        thresholds=None,
        residual=blank_B,
        status=torch.where(finite_B, int(Status.CONVERGED), int(Status.NOT_FINITE)),
        num_steps=torch.zeros_like(finite_B, dtype=torch.int32),
    )


maximin = Maximin()
equilibrium = Equilibrium()
soft_threshold = SoftThreshold()
solo = Solo()
by_name: Mapping[str, Rule] = MappingProxyType(
    {
        RuleName.EQUILIBRIUM: equilibrium,
        RuleName.LINEAR: linear,
        RuleName.MIXTURE: mixture,
        RuleName.FORWARD_KL: forward_kl,
        RuleName.JENSEN_SHANNON: jensen_shannon,
        RuleName.MAXIMIN: maximin,
        RuleName.SOFT_THRESHOLD: soft_threshold,
        RuleName.SOLO: solo,
        RuleName.PARM: linear,  # over other values: those of one reward model at the game's weights
        RuleName.BEST_OF_N: best_of_n,
        RuleName.BASE: base,
    }
)
