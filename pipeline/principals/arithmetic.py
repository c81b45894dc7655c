"""Formulas over the log-probabilities of several models, such as `formal - 0.5 * max(rude, toxic)`.

A formula is read by Python's own parser and then restricted to numbers, names, +, -, *, / by a number, max(...) and
min(...). Nothing of it is ever run as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeline.quoting import quote

if TYPE_CHECKING:
    from torch import Tensor

COMBINE: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
)
MOST_LETTERS = 2000
MOST_LEVELS = 200  # of parts within parts: each is a call while a value is computed
FORM = "a formula has numbers, names of terms, +, -, *, / by a number, parentheses, max(...) and min(...)"


class Formula:
    """A formula over named terms.

    Args:
        text: of the formula.

    Attributes:
        names: of the terms, in the order in which they first occur.

    Raises:
        ValueError: it is none, or a product or quotient in it is no multiple of a log-probability.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_LETTERS:
            raise ValueError(f"the formula has {len(text):,} letters; at most {MOST_LETTERS:,} are read")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{quote(text)} is no formula: {FORM}") from None
        if _has_more_levels(self._tree, MOST_LEVELS):
            raise ValueError(f"{quote(text)} has parts within parts in more than {MOST_LEVELS} levels")
        self._text = text
        self.names = tuple(dict.fromkeys(self._names(self._tree)))
        if not self.names:
            raise ValueError(f"{quote(text)} names no term, so its reward would be the same at every token")

    def value(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The formula's value, of terms of one shape by name."""
        value = self._value(self._tree, terms)
        assert not isinstance(value, float)  # a formula has a name in it
        return value

    def _names(self, node: ast.expr) -> list[str]:
        """The names below a node, which is checked. Raises ValueError."""
        match node:
            case ast.Name(id=name):
                return [name]
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and _is_finite(number):
                return []
            case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
                return self._names(operand)
            case ast.BinOp(left=left, op=op, right=right):
                first, second = self._names(left), self._names(right)
                if isinstance(op, ast.Add | ast.Sub) or (isinstance(op, ast.Mult) and not (first and second)):
                    return first + second
                if isinstance(op, ast.Div) and not second and _number(right) != 0:
                    return first
            case ast.Call(func=ast.Name(id="max" | "min"), args=args, keywords=[]) if len(args) >= 2:
                return [name for each in args for name in self._names(each)]
        raise ValueError(f"{quote(ast.unparse(node))} in {quote(self._text)} cannot be computed: {FORM}")

    def _value(self, node: ast.expr, terms: Mapping[str, Tensor]) -> Tensor | float:
        match node:
            case ast.Name(id=name):
                return terms[name]
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, terms)
                return -value if isinstance(op, ast.USub) else value
            case ast.BinOp(left=left, op=op, right=right):
                combined: Tensor | float = COMBINE[type(op)](self._value(left, terms), self._value(right, terms))
                return combined
            case ast.Call(func=ast.Name(id=name), args=args):
                return reduce(_larger if name == "max" else _smaller, [self._value(each, terms) for each in args])
        return _number(node)


def _has_more_levels(tree: ast.AST, most: int) -> bool:
    level: list[ast.AST] = [tree]
    for _ in range(most):
        level = [child for node in level for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if not level:
            return False
    return True


def _number(node: ast.expr) -> float:
    """The value of a part without names."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=op, operand=operand):
            return -_number(operand) if isinstance(op, ast.USub) else _number(operand)
        case ast.BinOp(left=left, op=op, right=right):
            combined: float = COMBINE[type(op)](_number(left), _number(right))
            return combined
        case ast.Call(func=ast.Name(id=name), args=args):
            return (max if name == "max" else min)(_number(each) for each in args)
    raise AssertionError(ast.dump(node))


def _is_finite(number: float) -> bool:
    try:
        return abs(float(number)) < float("inf")
    except OverflowError:
        return False


def _larger(first: Tensor | float, second: Tensor | float) -> Tensor | float:
    return _clamped(first, second, is_max=True)


def _smaller(first: Tensor | float, second: Tensor | float) -> Tensor | float:
    return _clamped(first, second, is_max=False)


def _clamped(first: Tensor | float, second: Tensor | float, *, is_max: bool) -> Tensor | float:
    """The larger or the smaller of two values, either of which may be a number."""
    if isinstance(first, float) and isinstance(second, float):
        return max(first, second) if is_max else min(first, second)
    if isinstance(first, float):
        first, second = second, first
    assert not isinstance(first, float)
    if isinstance(second, float):
        return first.clamp(min=second) if is_max else first.clamp(max=second)
    return first.maximum(second) if is_max else first.minimum(second)
