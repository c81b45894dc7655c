"""How far a run is and what it waits for: counts, waits, progress line, stall watch."""
