"""What a pass costs by how many positions it draws tokens at, and whether a proposed token is worth its own."""

from __future__ import annotations

DECAY = 0.98  # of the weight of a pass with each later one
PROBES = 3  # passes that are made larger to learn what that costs
LEAST_SPREAD = 0.5  # weighted sum of squares of the numbers of positions, below which it is to be learned again
MARGIN = 1.05  # by how much a proposed token must be worth more than it costs
LARGEST = 4.0  # times what was expected; a pass that took longer waited for something else
PRIOR_SPREAD = 32.0  # of positions that were seen to cost nothing, where they are known to cost next to nothing


class Pace:
    """A line through the seconds of late passes: one part for any pass, one for each position.

    A proposed token that is likely enough makes tokens cheaper. Where arithmetic is what a pass waits for, as on a
    CPU with many rows, none is; where it waits for memory, nearly all are.

    Args:
        is_free: whether a pass has a fixed shape with room for more positions. They are taken to cost nothing until
            passes show otherwise (each attends over its row), so none is made larger to learn that.
    """

    def __init__(self, *, is_free: bool = False) -> None:
        self._is_free = is_free
        self._weight = self._positions = self._seconds = 0.0
        self._squares = self._products = 0.0
        self._probes_left = PROBES

    def note(self, num_positions: int, seconds: float) -> None:
        """Count a pass over decoded rows alone."""
        if self._weight > 2 and seconds > LARGEST * self.seconds(num_positions):
            return
        for name in ("_weight", "_positions", "_seconds", "_squares", "_products"):
            setattr(self, name, DECAY * getattr(self, name))
        self._weight += 1
        self._positions += num_positions
        self._seconds += seconds
        self._squares += num_positions**2
        self._products += num_positions * seconds

    @property
    def _spread(self) -> float:
        return self._squares - self._positions**2 / self._weight if self._weight else 0.0

    @property
    def slope(self) -> float:
        """Seconds that one more position takes."""
        if self._spread < LEAST_SPREAD:
            return 0.0
        products = self._products - self._positions * self._seconds / self._weight
        spread = self._spread + PRIOR_SPREAD * self._is_free
        # a pass takes no time without positions at least: what it takes is then all of the positions
        return min(max(products / spread, 0.0), self._seconds / self._positions)

    def seconds(self, num_positions: int) -> float:
        """What a pass over so many positions takes."""
        mean_s, mean = self._seconds / self._weight, self._positions / self._weight
        return mean_s + self.slope * (num_positions - mean)

    def begins_probe(self) -> bool:
        """Whether this pass is to be made larger, to learn what that costs. Ask once for each that could be."""
        if self._is_free or self._weight < PROBES:  # passes as they are come first
            return False
        if not self._probes_left and self._spread < LEAST_SPREAD:
            self._probes_left = 1
        if not self._probes_left:
            return False
        self._probes_left -= 1
        return True

    def is_worth(self, chance: float, expected: float, num_positions: int, *, spent_s: float = 0.0) -> bool:
        """Whether one more position lowers the seconds for each token.

        Args:
            chance: that its token is drawn.
            expected: tokens that the pass gives without it.
            num_positions: of the pass without it.
            spent_s: seconds that were spent before the pass.
        """
        return self.gain(chance, 1, expected, num_positions, spent_s=spent_s) > 0

    def gain(
        self,
        tokens: float,
        num_more: float,
        expected: float,
        num_positions: int,
        *,
        spent_s: float = 0.0,
        extra_s: float = 0.0,
    ) -> float:
        """What more positions bring beyond what they cost; above 0 where they lower the seconds for each token.

        Args:
            tokens: that they are expected to give.
            num_more: positions.
            expected: tokens that the step gives without them.
            num_positions: of the pass without them.
            spent_s: seconds that the step has taken before the pass.
            extra_s: seconds that they take beside the pass: one of a model that proposes them.
        """
        if not self.is_known:
            return 0.0
        step_s = self.seconds(num_positions) + spent_s
        return tokens * step_s - MARGIN * expected * (self.slope * num_more + extra_s)

    @property
    def is_known(self) -> bool:
        """Whether passes of several sizes were seen, or any where their sizes are alike."""
        return self.is_begun if self._is_free else self._spread >= LEAST_SPREAD

    @property
    def is_begun(self) -> bool:
        """Whether a pass was seen."""
        return self._weight > 0
