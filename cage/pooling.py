"""Solve games over a full vocabulary by solving games over a few hundred tokens.

Tokens that the same principals pay for respond to thresholds in the same way. As long as none of them changes sides,
they can be pooled into one token without changing anything (docs/mathematics.md, "Pooling"). A game over V tokens
becomes one over the m tokens of most weight and P pools. That game is solved, the residual is computed over all V
tokens, and where it shows that a token did change sides, the tokens are pooled again at the answer.

Shapes: B rows (R of them in a block), J principals, V tokens, K = m + P tokens of a pooled game.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cage.game import Game
from cage.normalization import Measures, NormalizedGame, excess, log_base, row_blocks, scale
from cage.response import newton_step, offers, pays, respond
from cage.solution import Solution, SolutionBuilder

_SMALLEST_VOCABULARY = 4096  # below it, solving over all tokens takes less time than the passes of pooling
# Every principal at least doubles the number of pools, and except on a CPU also the passes that fill them.
_MOST_PRINCIPALS, _MOST_PRINCIPALS_ELSEWHERE = 8, 4
_CORRECTIONS, _CORRECTABLE = 3, 0.3  # Newton steps after a pooled solve, and the largest residual they start from
_GROUP = 64  # neighbouring tokens of which only the largest is compared at first
# Bands of distance per principal, by the number of principals. Even, so that no band is on both sides of a threshold;
# few for three or more principals, because the path evaluates the pooled game many times.
BANDS = (0, 128, 16, 4, 2, 2, 2, 2, 2)
_WIDTH = 3.0  # agent temperatures within which half of the bands lie
_KEPT_TOKENS = (128, 128, 128, 1024, 1024, 1024)  # m, by round; more for the few rows that have not settled


class Find(Protocol):
    """Find scaled thresholds [B, J] of a normalized game and count evaluations [B]; `near_BJ` is a start."""

    def __call__(self, game: NormalizedGame, near_BJ: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


def is_worth_pooling(game: Game) -> bool:
    """Return whether pooling saves time for games of this shape on this device.

    Never depends on the number of rows: both ways give slightly different bits.
    """
    most = _MOST_PRINCIPALS if game.values.device.type == "cpu" else _MOST_PRINCIPALS_ELSEWHERE
    return game.num_tokens >= _SMALLEST_VOCABULARY and 0 < game.num_principals <= most


def solve_pooled(game: Game, measures: Measures, find: Find, *, tol: float, max_steps: int) -> Solution:
    """Solve pooled games, round by round, until the residual over all tokens is at most tol.

    measures: what `measure` returned for the game.
    find: solves a pooled game.
    tol: largest residual that counts as converged.
    max_steps: rows that took so many evaluations are not pooled again.

    Rows that no round has settled are solved over all tokens, one at a time to limit the memory.
    """
    builder = SolutionBuilder(game, measures)
    rows = torch.arange(game.num_rows, device=game.values.device)
    num_steps_B = torch.zeros_like(rows, dtype=torch.int32)
    at_RJ, near_RJ, kept_RM = measures.no_offer_thresholds, None, None
    for num_kept in _KEPT_TOKENS:
        if kept_RM is not None and kept_RM.shape[1] != num_kept:
            kept_RM = None
        chosen = _unless_all(rows, game)
        pooled, kept_RM = pool(game, measures, at_RJ, rows=chosen, num_kept=num_kept, kept_RM=kept_RM)
        at_RJ, steps_R = find(pooled, near_RJ)
        num_steps_B = num_steps_B.index_add(0, rows, steps_R)
        builder.set_thresholds(at_RJ, chosen)
        num_steps_B = num_steps_B.index_add(0, rows, _correct(builder, pooled, rows, tol))
        unsolved = ((builder.residual[rows] > tol) & (num_steps_B[rows] < max_steps)).nonzero()[:, 0]
        rows, kept_RM = rows[unsolved], kept_RM[unsolved]
        at_RJ = near_RJ = builder.thresholds[rows]
        if rows.shape[0] == 0:
            break
    for row in torch.split(rows, 1):
        at_1J, steps_1 = find(scale(game, measures, row), builder.thresholds[row])
        builder.set_thresholds(at_1J, row)
        num_steps_B = num_steps_B.index_add(0, row, steps_1)
    return builder.build(num_steps_B, tol)


def _correct(builder: SolutionBuilder, pooled: NormalizedGame, rows: Tensor, tol: float) -> Tensor:
    """Take Newton steps with the residual over all tokens and the Jacobian of the pooled game; return how many [R].

    The few tokens that changed sides since they were pooled hardly change the Jacobian, and a step takes less time
    than pooling again.
    """
    num_steps_R = torch.zeros_like(rows, dtype=torch.int32)
    for _ in range(_CORRECTIONS):
        residual_R = builder.residual[rows]
        chosen = ((residual_R > tol) & (residual_R < _CORRECTABLE)).nonzero()[:, 0]
        if chosen.shape[0] == 0:
            break
        chosen_rows = rows[chosen]
        at_CJ = builder.thresholds[chosen_rows]
        response = respond(pooled.rows(chosen), at_CJ)
        step_CJ = newton_step(response._replace(log_residual=builder.slack[chosen_rows].log()))
        builder.set_thresholds(at_CJ + step_CJ.clamp_(-1.0, 1.0), _unless_all(chosen_rows, builder.game))
        num_steps_R[chosen] += 1
    return num_steps_R


def _unless_all(rows: Tensor, game: Game) -> Tensor | None:
    """Return rows, which are in order; or None if they are all rows, so that nothing is copied."""
    return None if rows.shape[0] == game.num_rows else rows


def pool(
    game: Game,
    measures: Measures,
    thresholds_RJ: Tensor,
    *,
    rows: Tensor | None = None,
    num_kept: int,
    kept_RM: Tensor | None = None,
) -> tuple[NormalizedGame, Tensor]:
    """Return the pooled games of some rows, and which tokens they keep [R, m].

    thresholds_RJ: scaled thresholds at which the tokens are pooled.
    rows: index [R] of the rows; None takes all.
    num_kept: m, how many tokens are kept as they are: those of most weight in the agent's policy.
    kept_RM: tokens to keep, instead of choosing them.

    Near the given thresholds, until a token that was not kept changes sides, a pooled game has exactly the residuals
    of the full game.
    """
    parts = []
    for block in row_blocks(game, thresholds_RJ.shape[0]):
        chosen = block if rows is None else rows[block]
        kept_block = None if kept_RM is None else kept_RM[block]
        parts.append(_pool_block(game, measures, chosen, thresholds_RJ[block], num_kept, kept_block))
    base_RK, values_RJK, kept_RM = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return NormalizedGame(torch.log_softmax(base_RK, 1), values_RJK), kept_RM


def _pool_block(
    game: Game,
    measures: Measures,
    rows: slice | Tensor,
    thresholds_RJ: Tensor,
    num_kept: int,
    kept_RM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    price_R1 = measures.temperature[rows, None].reciprocal()
    excess_RJV = excess(game, measures, rows, thresholds_RJ)
    logits_RV = log_base(game, measures, rows)
    for paid_RV in excess_RJV.clamp_min(0.0).unbind(1):
        logits_RV.addcmul_(paid_RV, price_R1)
    if kept_RM is None:
        kept_RM = heaviest(logits_RV, num_kept)
    kept_logits_RM = logits_RV.gather(1, kept_RM)
    kept_excess_RJM = excess_RJV.gather(2, kept_RM[:, None].expand(-1, excess_RJV.shape[1], -1))
    logits_RV.scatter_(1, kept_RM, -torch.inf)
    highest_R1 = logits_RV.amax(1, keepdim=True).clamp_min(torch.finfo(logits_RV.dtype).min)
    weights_RV = logits_RV.sub_(highest_R1).exp_()
    if weights_RV.device.type == "cpu":
        mass_RP, pooled_RJP = sum_by_distance(weights_RV, excess_RJV, measures.temperature[rows])
    else:
        mass_RP, pooled_RJP = sum_by_side(weights_RV, excess_RJV)
    pool_excess_RJP = torch.where(mass_RP[:, None] > 0.0, pooled_RJP / mass_RP[:, None], 0.0)
    weights_RK = torch.cat([kept_logits_RM, mass_RP.log() + highest_R1], 1)
    excess_RJK = torch.cat([kept_excess_RJM, pool_excess_RJP], 2) * price_R1[..., None]
    # the weights contain what is paid at these thresholds; subtract it, because evaluating the game adds it again
    return offers(weights_RK, -excess_RJK.clamp_min(0.0)), excess_RJK + thresholds_RJ[..., None], kept_RM


def heaviest(logits_RV: Tensor, num_kept: int) -> Tensor:
    """Return the tokens of the highest logits [R, m].

    They lie in the m groups of neighbours with the highest maxima; finding those groups first takes half the time of
    one topk over all tokens.
    """
    num_rows, num_tokens = logits_RV.shape
    num_groups = num_tokens // _GROUP
    if num_groups < 4 * num_kept:
        return logits_RV.topk(min(num_kept, num_tokens), sorted=False).indices
    grouped_RGN = logits_RV[:, : num_groups * _GROUP].reshape(num_rows, num_groups, _GROUP)
    groups_RM = grouped_RGN.amax(2).topk(num_kept, sorted=False).indices
    neighbours_N = torch.arange(_GROUP, device=logits_RV.device)
    within = (groups_RM[..., None] * _GROUP + neighbours_N).flatten(1)
    left_over = torch.arange(num_groups * _GROUP, num_tokens, device=logits_RV.device)
    tokens = torch.cat([within, left_over.expand(num_rows, -1)], 1)
    return tokens.gather(1, logits_RV.gather(1, tokens).topk(num_kept, sorted=False).indices)


def sum_by_side(weights_RV: Tensor, excess_RJV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight [R, P] and the weighted excesses [R, J, P] of each of the P = 2^J sets of paying principals.

    Each principal in turn splits every pool in two. Sums along rows have a fixed order on every device.
    """
    excesses = excess_RJV.unbind(1)
    pools = [weights_RV]
    for excess_RV in excesses:
        pays_RV = pays(excess_RV)
        paid = [pool_RV * pays_RV for pool_RV in pools]
        pools = [pool_RV - paid_RV for pool_RV, paid_RV in zip(pools, paid, strict=True)] + paid
    mass_RP = torch.stack([pool_RV.sum(1) for pool_RV in pools], 1)
    sums = [torch.stack([(pool_RV * excess_RV).sum(1) for pool_RV in pools], 1) for excess_RV in excesses]
    return mass_RP, torch.stack(sums, 1)


def sum_by_distance(weights_RV: Tensor, excess_RJV: Tensor, temperature_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `sum_by_side` for finer pools: by side and by distance from each threshold.

    The bands of distance widen outwards. Only for a CPU: elsewhere scatter_add adds in no fixed order.
    """
    num_principals = excess_RJV.shape[1]
    num_bands = BANDS[num_principals]
    distance_RJV = excess_RJV.abs().add_((_WIDTH * temperature_R)[:, None, None])
    # between -1 and 1, not above 0 where the principal does not pay; the factor 1 - 1e-6 keeps it below 1
    distance_RJV = torch.div(excess_RJV, distance_RJV, out=distance_RJV)
    bands = distance_RJV.mul_(0.5 * num_bands * (1.0 - 1e-6)).add_(0.5 * num_bands).unbind(1)
    places_RV = bands[0]
    for band_RV in bands[1:]:
        places_RV = band_RV.add_(places_RV.floor_(), alpha=num_bands)
    places_RV = places_RV.to(torch.int64)
    nothing_RP = weights_RV.new_zeros((weights_RV.shape[0], num_bands**num_principals))
    sums = [nothing_RP.scatter_add(1, places_RV, weights_RV * excess_RV) for excess_RV in excess_RJV.unbind(1)]
    return nothing_RP.scatter_add(1, places_RV, weights_RV), torch.stack(sums, 1)
