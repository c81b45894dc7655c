"""One decoding step as a common-agency game (CAGE, section 3).

Shapes: B rows, J principals, V tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

_HALF_TYPES = (torch.float16, torch.bfloat16)
_TYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Game:
    """A batch of games: a base policy, every principal's value of every token, and the agent's temperature.

    base_logprobs: the base policy in logarithms, [B, V]. Need not be normalised; `-inf` marks a token that cannot be
        drawn, and its values are ignored.
    values: what each token is worth to each principal, preference weights included, [B, J, V]. In any unit; a
        constant added to a principal's values changes no equilibrium.
    agent_temperature: what moving away from the base policy costs the agent, in the unit of the values; a positive
        float, or a tensor with one entry per row, [B].

    float32 and float64 are kept, float16 and bfloat16 become float32. Gradients do not flow through a game: tensors
    that require them are detached.

    Raises ValueError for shapes, types, devices or temperatures that do not fit together. The numbers in
    base_logprobs and values are never a reason to raise: the status of a row says if they are not finite.
    """

    base_logprobs: Tensor
    values: Tensor
    agent_temperature: float | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_logprobs", _checked_type("base_logprobs", self.base_logprobs))
        object.__setattr__(self, "values", _checked_type("values", self.values))
        _check_shapes(self.base_logprobs, self.values)
        _check_temperature(self.agent_temperature, self.base_logprobs)
        if isinstance(self.agent_temperature, Tensor) and self.agent_temperature.requires_grad:
            object.__setattr__(self, "agent_temperature", self.agent_temperature.detach())

    @property
    def num_rows(self) -> int:
        return self.values.shape[0]

    @property
    def num_principals(self) -> int:
        return self.values.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.values.shape[2]

    @property
    def row_temperatures(self) -> Tensor:
        """The agent temperature of every row [B], in the type and on the device of the values."""
        if isinstance(self.agent_temperature, Tensor):
            return self.agent_temperature.to(self.values).expand(self.num_rows)
        return self.values.new_full((self.num_rows,), self.agent_temperature)


def _checked_type(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype in _HALF_TYPES:
        return tensor.float()
    if tensor.dtype not in _TYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")
    return tensor


def _check_shapes(base: Tensor, values: Tensor) -> None:
    if base.dim() != 2:
        raise ValueError(f"base_logprobs must be [rows, tokens]; got shape {tuple(base.shape)}")
    if values.dim() != 3:
        raise ValueError(f"values must be [rows, principals, tokens]; got shape {tuple(values.shape)}")
    if (values.shape[0], values.shape[2]) != tuple(base.shape):
        raise ValueError(
            f"values must have the rows and tokens of base_logprobs {tuple(base.shape)}; got {tuple(values.shape)}"
        )
    if base.shape[1] == 0:
        raise ValueError(f"base_logprobs must have at least one token; got shape {tuple(base.shape)}")
    if base.dtype != values.dtype:
        raise ValueError(f"values must have the type of base_logprobs, {base.dtype}; got {values.dtype}")
    if base.device != values.device:
        raise ValueError(f"values must be on the device of base_logprobs, {base.device}; got {values.device}")


def _check_temperature(temperature: float | Tensor, base: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, Real):
            kind = type(temperature).__name__
            raise ValueError(f"agent_temperature must be a number, or a tensor with one entry per row; got {kind}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"agent_temperature must be positive and finite; got {temperature}")
        return
    if temperature.dim() > 1 or (temperature.dim() == 1 and temperature.shape[0] != base.shape[0]):
        raise ValueError(
            f"agent_temperature must be a number or one per row [{base.shape[0]}]; got {tuple(temperature.shape)}"
        )
    if temperature.device != base.device:
        raise ValueError(
            f"agent_temperature must be on the device of base_logprobs, {base.device}; got {temperature.device}"
        )
    bad = ~(torch.isfinite(temperature) & (temperature > 0))
    if bool(bad.any()):
        raise ValueError(f"agent_temperature must be positive and finite; got {temperature[bad].flatten()[0].item()}")
