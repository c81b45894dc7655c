"""Training data from a run: answers are filtered, paired, split by prompt and written with a card."""
