"""Activation functions whose bits do not depend on a number's place in its tensor.

On a CPU torch computes sigmoid, silu, softplus, gelu's approximation and similar functions with vector instructions,
and the numbers that are left at the end of a tensor by other code, with other last bits. In a pass of several rows,
which row is at the end depends on the others. So in strict mode tensors that do not fill whole vectors are padded.
tanh, exp, gelu by erf, log, cos and rsqrt give the same bits either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

WHOLE = 64  # numbers; a multiple of every vector that a CPU has
SENSITIVE = frozenset(
    (
        torch.sigmoid,
        torch.Tensor.sigmoid,
        torch.special.expit,
        functional.sigmoid,
        functional.silu,
        functional.softplus,
        functional.logsigmoid,
        functional.hardswish,
        functional.mish,
        functional.elu,
        functional.gelu,  # its tanh approximation
        torch.exp2,
        torch.special.exp2,
        torch.sinh,
        torch.pow,
        torch.Tensor.pow,
        torch.Tensor.__pow__,
        torch.Tensor.__rpow__,
    )
)
EXACT_POWERS = (2, 3, -1, -2, 0.5, -0.5)  # computed by products and roots


def _is_sensitive(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a number's place decides about its bits in this call."""
    if function not in SENSITIVE or not args or not isinstance(args[0], Tensor):
        return False
    exponent = args[1] if len(args) > 1 else None
    is_power = function in (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)
    return not is_power or (not isinstance(exponent, Tensor) and exponent not in EXACT_POWERS)


class WholeVectors(TorchFunctionMode):
    """While it is active, sensitive functions compute whole vectors."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _is_sensitive(function, args) and args[0].numel() % WHOLE:
            numbers = args[0]
            padded = torch.cat([numbers.reshape(-1), numbers.new_zeros(-numbers.numel() % WHOLE)])
            options = {name: value for name, value in (kwargs or {}).items() if name != "inplace"}
            return function(padded, *args[1:], **options)[: numbers.numel()].view(numbers.shape)
        return function(*args, **(kwargs or {}))


class _Detector(TorchFunctionMode):
    """Detects whether a sensitive function gets a width that does not fill whole vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _is_sensitive(function, args) and args[0].shape[-1:] != ():
            self.found |= bool(args[0].shape[-1] % WHOLE)
        return function(*args, **(kwargs or {}))


@contextmanager
def watching() -> Iterator[_Detector]:
    """Run a pass within the block; afterwards `found` says whether the model needs `WholeVectors`."""
    with _Detector() as detector:
        yield detector
