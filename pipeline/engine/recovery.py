"""What the engine does about hosts that fail: finds the row that kills its host."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engine.row_state import RunningRow

MAX_LOSSES_IN_A_ROW = 5  # states lost by hosts that live, no row being finished in between


class PoisonRowIsolation:
    """Narrows down which row kills its host.

    The rows that were under way when a host failed run again, half as many at once; a row that was there at two
    failures, alone at the last, is convicted. A host lost for another reason costs only that its rows start again.
    """

    def __init__(self) -> None:
        self._failures: dict[tuple[str, int, int], int] = {}
        self._limit = 0

    def limit(self, num_slots: int) -> int:
        """Rows to have under way at once."""
        return min(self._limit, num_slots) if self._failures else num_slots

    def host_failed(self, rows: Sequence[RunningRow]) -> RunningRow | None:
        """Count a failure against the rows under way; the convicted one, if any. The others are then free."""
        for row in rows:
            self._failures[row.key] = self._failures.get(row.key, 0) + 1
        if len(rows) == 1 and self._failures[rows[0].key] > 1:
            self._failures.clear()
            return rows[0]
        if rows:
            self._limit = max(1, len(rows) // 2)
        return None

    def finished(self, row: RunningRow) -> None:
        """Clear a row that ended without harm."""
        self._failures.pop(row.key, None)
