"""What the engine does about hosts that fail: it isolates the row that kills its host."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engine.row_state import RunningRow

MAX_LOSSES_IN_A_ROW = 5  # states lost by hosts that live, while no row is finished in between


class PoisonRowIsolation:
    """Finds the row that kills its host, by bisection.

    The rows that were running when a host failed run again, half as many at once. A row that was there at two
    failures, and alone at the last one, is quarantined: it is rejected. A host that was lost for another reason costs
    only that its rows start again.
    """

    def __init__(self) -> None:
        self._failures: dict[tuple[str, int, int], int] = {}
        self._limit = 0

    def limit(self, num_slots: int) -> int:
        """Rows to have under way at once."""
        return min(self._limit, num_slots) if self._failures else num_slots

    def host_failed(self, rows: Sequence[RunningRow]) -> RunningRow | None:
        """Count a failure against the rows that were running; the one to quarantine, if any, which clears the
        others."""
        for row in rows:
            self._failures[row.key] = self._failures.get(row.key, 0) + 1
        if len(rows) == 1 and self._failures[rows[0].key] > 1:
            self._failures.clear()
            return rows[0]
        if rows:
            self._limit = max(1, len(rows) // 2)
        return None

    def finished(self, row: RunningRow) -> None:
        """Clear a row that ended well."""
        self._failures.pop(row.key, None)
