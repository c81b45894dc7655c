"""Models: where they come from, how rows share one set of weights."""
