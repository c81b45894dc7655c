"""Isolation of poison rows: finds the row that makes its host fail."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engine.row_state import RunningRow

# How often hosts that are alive may lose their state while no row finishes in between. Losing it now and then is
# normal (a reply was late); losing it again and again means that beginning again does not help.
MAX_CONSECUTIVE_LOSSES = 5


class PoisonRowIsolation:
    """Finds the row that kills its host, by bisection.

    The rows that were running when a host failed run again, half as many at once. A row that was running at two
    failures, and alone at the last one, is quarantined: it fails. One failure is never enough, as the host may
    have been lost for another reason; then its rows only begin again.
    """

    def __init__(self) -> None:
        self._failures: dict[tuple[str, int, int], int] = {}
        self._limit = 0

    def limit(self, num_slots: int) -> int:
        """How many of `num_slots` rows may run at once now."""
        return min(self._limit, num_slots) if self._failures else num_slots

    def host_failed(self, rows: Sequence[RunningRow]) -> RunningRow | None:
        """Count a failure against the rows that were running.

        Returns:
            The row to quarantine, which clears all others; None while there is more than one candidate.
        """
        for row in rows:
            self._failures[row.key] = self._failures.get(row.key, 0) + 1
        if len(rows) == 1 and self._failures[rows[0].key] > 1:
            self._failures.clear()
            return rows[0]
        if rows:
            self._limit = max(1, len(rows) // 2)
        return None

    def finished(self, row: RunningRow) -> None:
        """Clear a row that finished."""
        self._failures.pop(row.key, None)
