"""Common-agency games for decoding, solved exactly: an equilibrium is one threshold per principal.

Names are imported on first use, because torch takes seconds to import and `RuleName` does not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cage.rule_names import RuleName

if TYPE_CHECKING:
    from cage import rules
    from cage.certificate import deviation_gain
    from cage.game import Game
    from cage.newton import FixedStepNewton, ThresholdNewton, solve
    from cage.solution import Solution, Status
    from cage.sweeps import GaussSeidel, Jacobi

__all__ = [
    "FixedStepNewton",
    "Game",
    "GaussSeidel",
    "Jacobi",
    "RuleName",
    "Solution",
    "Status",
    "ThresholdNewton",
    "deviation_gain",
    "rules",
    "solve",
]

_MODULE_BY_NAME = {
    "FixedStepNewton": "cage.newton",
    "Game": "cage.game",
    "GaussSeidel": "cage.sweeps",
    "Jacobi": "cage.sweeps",
    "Solution": "cage.solution",
    "Status": "cage.solution",
    "ThresholdNewton": "cage.newton",
    "deviation_gain": "cage.certificate",
    "solve": "cage.newton",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name == "rules":
        return import_module("cage.rules")
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_BY_NAME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
