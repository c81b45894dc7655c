"""Common-agency games for decoding, solved exactly: an equilibrium is one threshold a principal."""

from cage import rules
from cage.certificate import deviation_gain
from cage.game import Game
from cage.newton import FixedStepNewton, ThresholdNewton
from cage.solution import Solution, Status
from cage.sweeps import GaussSeidel, Jacobi

__all__ = [
    "FixedStepNewton",
    "Game",
    "GaussSeidel",
    "Jacobi",
    "Solution",
    "Status",
    "ThresholdNewton",
    "deviation_gain",
    "rules",
    "solve",
]


def solve(game: Game) -> Solution:
    """Return one equilibrium a row, by the default method."""
    return ThresholdNewton().solve(game)
