"""Seeded random games of many kinds, for tests, benchmarks and first experiments.

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from cage.game import Game

Draw = Callable[..., Tensor]
Kind = Callable[[Draw, Draw, tuple[int, int, int]], tuple[Tensor, Tensor]]


def random_games(
    kind: str,
    *,
    num_rows: int,
    num_principals: int,
    num_tokens: int,
    value_scale: float,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Game:
    """Return games of one kind with agent temperature 1; value_scale is about the spread of the values.

    The same arguments give the same games. Raises ValueError for a kind that is not in `kinds`.
    """
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}; got {kind}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    base_BV, values_BJV = kinds[kind](normal, uniform, (num_rows, num_principals, num_tokens))
    return Game(base_BV.to(dtype), (values_BJV * value_scale).to(dtype), 1.0)


def _plain(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return normal(shape[0], shape[2]), normal(*shape)


def _peaked(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return 4.0 * normal(shape[0], shape[2]), normal(*shape)


def _flat(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape[0], shape[2], dtype=torch.float64), normal(*shape)


def _arm_like(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Log-ratios of a tuned model's distribution to the base's, with a tenth of the tokens in a tail to -30."""
    base_BV = torch.log_softmax(3.0 * normal(shape[0], shape[2]), -1)
    tails_BJV = 30.0 * uniform(*shape) * (uniform(*shape) < 0.1)
    tuned_BJV = torch.log_softmax(base_BV[:, None] + normal(*shape) - tails_BJV, -1)
    return base_BV, tuned_BJV - base_BV[:, None]


def _ties(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return normal(shape[0], shape[2]).round(), normal(*shape).round()


def _equal_principals(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    num_rows, _, num_tokens = shape
    return normal(num_rows, num_tokens), normal(num_rows, 1, num_tokens).expand(shape).clone()


def _common_interest(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    num_rows, _, num_tokens = shape
    return normal(num_rows, num_tokens), normal(num_rows, 1, num_tokens) + 0.1 * normal(*shape)


def _vetoes(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A common interest, and for every principal some tokens that it abhors: several equilibria may exist."""
    num_rows, _, num_tokens = shape
    liked_BJV = uniform(num_rows, 1, num_tokens).expand(shape)
    return 3.0 * normal(num_rows, num_tokens), torch.where(
        uniform(*shape) < 0.3, -3.0 * normal(*shape).abs(), liked_BJV
    )


def _masked(normal: Draw, uniform: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Some tokens cannot be drawn; in every fourth row all but one."""
    base_BV, values_BJV = normal(shape[0], shape[2]), normal(*shape)
    undrawable_BV = uniform(shape[0], shape[2]) < 0.3
    undrawable_BV[::4] = True
    undrawable_BV[:, 0] = False
    return base_BV.masked_fill(undrawable_BV, -torch.inf), values_BJV.masked_fill(undrawable_BV[:, None], -torch.inf)


kinds: Mapping[str, Kind] = MappingProxyType(
    {
        "plain": _plain,
        "peaked": _peaked,
        "flat": _flat,
        "arm-like": _arm_like,
        "ties": _ties,
        "equal principals": _equal_principals,
        "common interest": _common_interest,
        "vetoes": _vetoes,
        "masked": _masked,
    }
)
