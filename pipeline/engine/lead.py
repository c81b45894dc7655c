"""What it costs to wait for tokens, where a step is otherwise sent before those of the last one have arrived.

A draft needs to know the newest tokens, and after it only a comparison says which they are. So a step with a draft is
followed by one that waits: what the coordinator does between the two is time in which a GPU has nothing to do.
"""

from __future__ import annotations

from pipeline.engine.pace import LARGEST, MARGIN, Pace

DECAY = 0.9  # of the weight of a gap with each later one


class Lead:
    """Seconds of steps that were sent ahead, and of the gaps before those that were not."""

    def __init__(self) -> None:
        self._ahead = Pace(is_free=True)
        self._gaps_s = self._weight = 0.0

    def note_ahead(self, num_positions: int, seconds: float) -> None:
        """Count a step that was sent ahead: from the end of the last one to its own."""
        self._ahead.note(num_positions, seconds)

    def note_gap(self, seconds: float) -> None:
        """Count the time from the end of a step to the next one, which waited for it."""
        if self._weight > 2 and seconds > LARGEST * self.gap_s:
            return
        self._gaps_s, self._weight = DECAY * self._gaps_s + seconds, DECAY * self._weight + 1

    @property
    def is_begun(self) -> bool:
        """Whether a step was sent ahead."""
        return self._ahead.is_begun

    @property
    def gap_s(self) -> float:
        """Seconds of such a gap."""
        return self._gaps_s / self._weight if self._weight else 0.0

    def wait_s(self, num_rows: int, pace: Pace) -> float:
        """Seconds that a step of so many rows takes longer where the next one waits; 0 where that is not known.

        Args:
            num_rows: without a draft.
            pace: of steps that were not sent ahead.
        """
        if not (self.is_begun and pace.is_begun):
            return 0.0
        return max(0.0, self.gap_s + pace.seconds(num_rows) - self._ahead.seconds(num_rows))

    def is_worth_waiting(
        self, tokens: float, num_positions: int, num_rows: int, pace: Pace, *, spent_s: float = 0.0
    ) -> bool:
        """Whether a step with a draft gives more tokens a second, waiting included, than one that is sent ahead.

        False where that is not known.

        Args:
            tokens: that it is expected to give.
            num_positions: of its pass.
            num_rows: of the pass without a draft.
            pace: of steps that were not sent ahead.
            spent_s: on the draft, whether it is verified or not.
        """
        if not (self.is_begun and pace.is_begun):
            return False
        with_draft_s = pace.seconds(num_positions) + self.gap_s + spent_s
        return tokens * (self._ahead.seconds(num_rows) + spent_s) > MARGIN * num_rows * with_draft_s
