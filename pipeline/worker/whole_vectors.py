"""Activation functions and narrow products whose bits do not depend on a number's place in its tensor.

On a CPU torch computes sigmoid, silu, softplus, gelu's approximation and similar functions with vector instructions,
and the numbers that are left at the end of a tensor by other code, with other last bits. In a pass of several rows,
which row is at the end depends on the others. So in strict mode tensors that do not fill whole vectors are padded.
tanh, exp, gelu by erf, log, cos and rsqrt give the same bits either way.

A product with a single output, such as the gate of a shared expert, is a product of a matrix and a vector to a CPU:
in what order its numbers are added depends on how many rows there are. It is given a second output, which is dropped.
Products of fewer than four rows, which experts have that few tokens chose, are given four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from pipeline.worker.captured_passes import MIN_ROWS

WHOLE = 64  # numbers; a multiple of every vector that a CPU has
SENSITIVE = frozenset(
    (
        torch.sigmoid,
        torch.Tensor.sigmoid,
        torch.Tensor.sigmoid_,
        torch.special.expit,
        functional.sigmoid,
        functional.silu,
        functional.softplus,
        functional.logsigmoid,
        functional.hardswish,
        functional.mish,
        functional.elu,
        functional.celu,
        functional.selu,
        functional.gelu,  # its tanh approximation
        torch.exp2,
        torch.special.exp2,
        torch.sinh,
        torch.cosh,
        torch.pow,
        torch.Tensor.pow,
        torch.Tensor.__pow__,
        torch.Tensor.__rpow__,
    )
)
PRODUCTS = frozenset(
    (functional.linear, torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm)
)
WATCHED = SENSITIVE | PRODUCTS  # every function of torch passes here: the others must cost nothing
EXACT_POWERS = (2, 3, -1, -2, 0.5, -0.5)  # computed by products and roots


def _is_narrow(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call is a linear map to one number."""
    return function is functional.linear and len(args) > 1 and bool(args[1].shape[0] == 1)


def _is_short(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call is a product of a few rows with a matrix."""
    if function not in PRODUCTS or len(args) < 2 or args[1].dim() != 2:
        return False
    return bool(args[0].dim() > 1 and 0 < args[0].shape[:-1].numel() < MIN_ROWS)


def _product(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """A narrow or a short product, computed as a wider and a longer one."""
    states, matrix, *others = args
    rows = states.reshape(-1, states.shape[-1])
    bias = others[0] if others else kwargs.get("bias")
    is_narrow = _is_narrow(function, args)
    if is_narrow:
        matrix, bias = pad(matrix, (0, 0, 0, 1)), None if bias is None else pad(bias, (0, 1))
    longer = pad(rows, (0, 0, 0, max(0, MIN_ROWS - len(rows))))
    out = functional.linear(longer, matrix, bias) if function is functional.linear else longer @ matrix
    out = out[: len(rows), :1] if is_narrow else out[: len(rows)]
    return out.reshape(*states.shape[:-1], out.shape[-1])


def _is_sensitive(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a number's place decides about its bits in this call."""
    if function not in SENSITIVE or not args or not isinstance(args[0], Tensor):
        return False
    exponent = args[1] if len(args) > 1 else None
    is_power = function in (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)
    return not is_power or (not isinstance(exponent, Tensor) and exponent not in EXACT_POWERS)


class WholeVectors(TorchFunctionMode):
    """While it is active, sensitive functions compute whole vectors, and narrow and short products larger ones."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in WATCHED:
            return function(*args, **kwargs)
        if _is_narrow(function, args) or _is_short(function, args):
            return _product(function, args, kwargs)
        # a tensor with gaps, such as half of a wider one, is computed run by run: each run has an end of its own
        if _is_sensitive(function, args) and (args[0].numel() % WHOLE or not args[0].is_contiguous()):
            numbers = args[0]
            padded = torch.cat([numbers.reshape(-1), numbers.new_zeros(-numbers.numel() % WHOLE)])
            options = {name: value for name, value in kwargs.items() if name != "inplace"}
            result = function(padded, *args[1:], **options)[: numbers.numel()].view(numbers.shape)
            return numbers.copy_(result) if function is torch.Tensor.sigmoid_ else result
        return function(*args, **kwargs)


class _Detector(TorchFunctionMode):
    """Detects whether a sensitive function gets a width that does not fill whole vectors, or a map has one output."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function not in WATCHED:
            return function(*args, **(kwargs or {}))
        if _is_sensitive(function, args) and args[0].shape[-1:] != ():
            self.found |= bool(args[0].shape[-1] % WHOLE)
        self.found |= _is_narrow(function, args)
        return function(*args, **(kwargs or {}))


@contextmanager
def detect_partial_vectors() -> Iterator[_Detector]:
    """Run a pass within the block; afterwards `found` says whether the model needs `WholeVectors`."""
    with _Detector() as detector:
        yield detector
