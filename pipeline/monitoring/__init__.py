"""Progress of a run: counts, waits, progress line, stall detection."""
